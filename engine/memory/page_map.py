"""What every page of a pool is at one moment, page by page: for pictures; ``pool_snapshot`` counts the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.memory.integers import Int32
from engine.memory.manager import CacheManager
from engine.memory.scope import CacheScope

FREE, HELD, LOCKED, CACHED = range(4)  # states; HELD: by rows and not cached, CACHED: and not locked
NOBODY = -1


@dataclass(frozen=True, eq=False)
class PageMap:
    """Every page of a pool. Vectors have one entry for each page id, the null page's (which is FREE) included.

    Attributes:
        state: uint8 ``[pages + 1]`` FREE, HELD, LOCKED or CACHED.
        group: int32 ``[pages + 1]`` the group of layers that it serves; 0 where it is free.
        row: int32 ``[pages + 1]`` the first row that holds it, or NOBODY.
        rows: int32 ``[pages + 1]`` how many rows hold it.
        scope: int32 ``[pages + 1]`` which of ``scopes`` a cached page has, or NOBODY.
        before: int32 ``[pages + 1]`` the page before it in its cached sequence and group, 0 at the beginning.
        scopes: the scopes of cached pages.
    """

    state: npt.NDArray[np.uint8]
    group: Int32
    row: Int32
    rows: Int32
    scope: Int32
    before: Int32
    scopes: tuple[CacheScope, ...]

    @classmethod
    def of(cls, cache: CacheManager) -> PageMap:
        """Looks at every row and every node of the prefix trees; for monitoring, not for each step."""
        count = cache.size // cache.page_size + 1
        group, rows, before = np.zeros((3, count), np.int32)
        row, scope = np.full((2, count), NOBODY, np.int32)
        state: npt.NDArray[np.uint8] = np.full(count, FREE, np.uint8)
        for each in reversed(cache.page_table.rows_in_use().tolist()):  # so that the first row stays
            _note_row(cache.page_table.pages_by_group(each), each, row, rows, group)
        state[rows > 0] = HELD
        cached = _CachedPages.of(cache)
        for index, own in enumerate(cached.pages):
            present = own > 0
            pages = own[present]
            group[pages], scope[pages] = index, cached.scope[present]
            before[pages] = cached.before[index][present]
            is_full = cache.page_table.windows[index] is None
            is_kept = cached.is_locked[present] if is_full else rows[pages] > 0
            state[pages] = np.where(is_kept, LOCKED, CACHED)
        return cls(state, group, row, rows, scope, before, cached.scopes)

    def counts(self) -> tuple[int, int, int, int]:
        """Pages that are free, held, locked and cached; the null page is none."""
        free, held, locked, cached = np.bincount(self.state[1:], minlength=4).tolist()
        return free, held, locked, cached


@dataclass(frozen=True)
class _CachedPages:
    """The pages of the prefix trees, ``[groups, n]``, one column for each page of tokens; ``before`` likewise."""

    pages: Int32
    before: Int32
    scope: Int32
    is_locked: npt.NDArray[np.bool_]
    scopes: tuple[CacheScope, ...]

    @classmethod
    def of(cls, cache: CacheManager) -> _CachedPages:
        """All nodes side by side: Python works once per node."""
        numbers: dict[CacheScope, int] = {}
        scopes, runs, ends, locked = [], [], [], []
        for its_scope, pages, its_end, is_locked in cache.prefix.nodes():
            scopes.append(numbers.setdefault(its_scope, len(numbers)))
            runs.append(pages)
            ends.append(its_end)
            locked.append(is_locked)
        groups = cache.page_table.num_groups
        every = np.concatenate([np.zeros((groups, 0), np.int32), *runs], axis=1)
        sizes = np.array([pages.shape[1] for pages in runs], np.int64)
        before = np.zeros_like(every)
        before[:, 1:] = every[:, :-1]
        if runs:
            before[:, sizes.cumsum() - sizes] = np.array(ends, np.int32).T
        scope = np.repeat(np.array(scopes, np.int32), sizes)
        return cls(every, before, scope, np.repeat(np.array(locked, np.bool_), sizes), tuple(numbers))


def _note_row(pages: npt.NDArray[Any], number: int, row: Int32, rows: Int32, group: Int32) -> None:
    """Notes the pages ``[groups, n]`` that a row holds."""
    for index, own in enumerate(pages):
        held = own[own > 0]
        row[held], group[held] = number, index
        rows[held] += 1
