"""Three ways to divide the same bytes between layers that need all tokens and layers that need a window of them.

Bytes are counted in units: a page of the layers of one group. A model of one full to five windowed groups fills six
units with a page of tokens of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.memory.admission import Admission
from engine.memory.integers import Int32, Int64
from engine.memory.manager import CacheManager
from engine.memory.scope import CacheScope

PAGE_SIZE, WINDOW, WINDOWED_GROUPS = 16, 1_024, 5
GROUPS = 1 + WINDOWED_GROUPS
STEP_TOKENS = 4_096  # new tokens of a step
NO_TOKENS = np.empty(0, np.int32)


@dataclass(frozen=True)
class Part:
    """One pool of a design.

    Attributes:
        cache: its pages and rows.
        units: units that one page takes.
        windowed: of each group of ``cache``, those of the units that belong to windowed layers.
        row_of: the row of a request here, by its row in the design's ``cache``.
    """

    cache: CacheManager
    units: int
    windowed: tuple[int, ...]
    row_of: Int32

    @property
    def free_units(self) -> int:
        """Units that no request holds."""
        return self.cache.reclaimable_pages * self.units

    def wasted_units(self, rows: Int32, starts: Int64) -> float:
        """Units that no query can read: of pages that lie wholly behind the window, and of slots without a token.

        Args:
            rows: ``[B]`` rows of the requests, in the design's ``cache``.
            starts: ``[B]`` tokens before the next query of each.
        """
        table, mine, wasted = self.cache.page_table, self.row_of[rows], 0
        behind = np.maximum(starts - WINDOW + 1, 0) // PAGE_SIZE
        for group, units in enumerate(self.windowed):
            if units:
                held = table.rows(mine, group) > 0
                wasted += units * int((held & (np.arange(table.max_pages) < behind[:, None])).sum())
        tails = int((-table.kv_lens(mine).astype(np.int64) % PAGE_SIZE).sum())
        return wasted + tails * len(self.windowed) * self.units / PAGE_SIZE


@dataclass(frozen=True)
class Design:
    """A way to divide the bytes.

    Attributes:
        name: for the tables.
        cache: what the engine admits from and grows in.
        parts: the pools behind it.
    """

    name: str
    cache: CacheManager
    parts: Sequence[Part]


class SplitCache(CacheManager):
    """A pool for windows beside one for full attention: a request needs room in both, and takes what it needs in both.

    Nothing is kept of past requests.

    Args:
        full_pages, window_pages: pages of the two pools.
        max_requests, max_context_tokens: as for a CacheManager.
    """

    def __init__(self, full_pages: int, window_pages: int, max_requests: int, max_context_tokens: int) -> None:
        super().__init__(
            window_pages * PAGE_SIZE,
            PAGE_SIZE,
            max_requests,
            max_context_tokens,
            policy=None,
            windows=(WINDOW,),
            ahead_tokens=STEP_TOKENS,
        )
        self.full = CacheManager(full_pages * PAGE_SIZE, PAGE_SIZE, max_requests, max_context_tokens, policy=None)
        self.full_row = np.zeros(max_requests, np.int32)  # by row of the pool for windows

    def admit(
        self,
        scope: CacheScope,
        token_ids: Int32,
        *,
        most_tokens: int | None = None,
        priority: int = 0,
        counts_hit: bool = True,
    ) -> Admission | None:
        """As a CacheManager, where both have room."""
        other = self.full.admit(scope, token_ids, most_tokens=most_tokens)
        if other is None:
            return None
        admission = super().admit(scope, token_ids, most_tokens=most_tokens, priority=priority, counts_hit=counts_hit)
        if admission is None:
            self.full.release(other.row, scope, NO_TOKENS)
        else:
            self.full_row[admission.row] = other.row
        return admission

    def has_room_to_grow(self, rows: npt.ArrayLike, counts: npt.ArrayLike) -> bool:
        """As a CacheManager, in both."""
        return super().has_room_to_grow(rows, counts) and self.full.has_room_to_grow(self._full_rows(rows), counts)

    def grow(self, rows: npt.ArrayLike, counts: npt.ArrayLike) -> None:
        """As a CacheManager, in both; the engine has asked whether there is room."""
        super().grow(rows, counts)
        self.full.grow(self._full_rows(rows), counts)

    def release(self, row: int, scope: CacheScope, token_ids: Int32) -> None:
        """As a CacheManager, in both."""
        super().release(row, scope, token_ids)
        self.full.release(int(self.full_row[row]), scope, token_ids)

    def check_integrity(self) -> None:
        """As a CacheManager, for both."""
        super().check_integrity()
        self.full.check_integrity()

    def _full_rows(self, rows: npt.ArrayLike) -> Int32:
        found: Int32 = self.full_row[np.asarray(rows)]
        return found


def with_groups(units: int, max_requests: int, context: int) -> Design:
    """One heap of pages that each group takes from."""
    cache = CacheManager(
        units * PAGE_SIZE,
        PAGE_SIZE,
        max_requests,
        context,
        policy=None,
        windows=(None, *[WINDOW] * WINDOWED_GROUPS),
        ahead_tokens=STEP_TOKENS,
    )
    rows = np.arange(max_requests, dtype=np.int32)
    return Design("groups", cache, [Part(cache, 1, (0, *[1] * WINDOWED_GROUPS), rows)])


def without_groups(units: int, max_requests: int, context: int) -> Design:
    """Every layer keeps every token."""
    cache = CacheManager(units // GROUPS * PAGE_SIZE, PAGE_SIZE, max_requests, context, policy=None)
    rows = np.arange(max_requests, dtype=np.int32)
    return Design("without groups", cache, [Part(cache, GROUPS, (WINDOWED_GROUPS,), rows)])


def half_and_half(units: int, max_requests: int, context: int) -> Design:
    """Half of the bytes for full attention, half for windows."""
    cache = SplitCache(units // 2, units // 2 // WINDOWED_GROUPS, max_requests, context)
    rows = np.arange(max_requests, dtype=np.int32)
    full = Part(cache.full, 1, (0,), cache.full_row)
    return Design("half and half", cache, [full, Part(cache, WINDOWED_GROUPS, (WINDOWED_GROUPS,), rows)])


DESIGNS = (with_groups, without_groups, half_and_half)
