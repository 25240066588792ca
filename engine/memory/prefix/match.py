"""Results and arguments of the prefix cache: matches, evicted pages, checked arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, ShapeError
from engine.memory.integers import Int32, Int64, integer_vector, integers_by_group, read_only
from engine.memory.pages import PageIds
from engine.memory.prefix.tree import RadixNode
from engine.memory.scope import CacheScope


@dataclass(eq=False, slots=True)
class PrefixMatch:
    """What ``RadixCache.match`` found: a handle to lock, to record and to unlock.

    Attributes:
        pages: int32 ``[n]`` page ids of the cached prefix, in the order of the tokens, read-only; of the first group
            where there are several (``RadixCache.pages_of`` has all), or numbers of entries without full attention.
        num_tokens: tokens in those pages.
        num_queried: tokens that were looked up.
        owner: the forest of the cache that may use it; a cleared cache has another one. Internal to the cache.
        node: the node at which or within which it ends; None if nothing of its scope is cached. Internal to the cache.
        locks: how often it is locked. Internal to the cache.
    """

    pages: PageIds
    num_tokens: int
    num_queried: int
    owner: object
    node: RadixNode | None
    locks: int = field(default=0, init=False)


@dataclass(frozen=True)
class EvictedPages:
    """Pages that are about to be released, their contents still in place.

    Attributes:
        scope: scope in which they were cached.
        token_ids: int32, the whole prefix up to the end of the last page.
        first_page: number of pages of the prefix before them.
        pages: int32 ``[n]`` page ids.
        group: the group of layers whose pages they are.
    """

    scope: CacheScope
    token_ids: Int32
    first_page: int
    pages: PageIds
    group: int = 0


def joined_runs(evicted: list[EvictedPages]) -> list[EvictedPages]:
    """The same pages in fewer items: what continues the item before it of the same prefix and group is one with it."""
    runs: list[EvictedPages] = []
    last: dict[int, int] = {}  # of each group, where its last item stands
    for each in evicted:
        before = runs[last[each.group]] if each.group in last else None
        if before is not None and before.first_page + before.pages.size == each.first_page and _continues(before, each):
            pages = PageIds(read_only(np.concatenate([before.pages, each.pages])))
            runs[last[each.group]] = EvictedPages(each.scope, each.token_ids, before.first_page, pages, each.group)
        else:
            last[each.group] = len(runs)
            runs.append(each)
    return runs


def _continues(before: EvictedPages, after: EvictedPages) -> bool:
    size = before.token_ids.size
    return before.scope == after.scope and np.array_equal(before.token_ids, after.token_ids[:size])


def checked_scope(scope: CacheScope) -> CacheScope:
    """The scope itself; raises ConfigError where it is none."""
    if not isinstance(scope, CacheScope):
        raise ConfigError(f"scope is a {type(scope).__name__}; it must be a CacheScope, with every field given")
    return scope


def token_vector(token_ids: npt.ArrayLike) -> Int32:
    """Reads token ids as int32; an int32 vector as it is.

    Raises:
        ShapeError: not a vector, not integers, or an integer beyond int32.
    """
    return _int32_vector("token_ids", token_ids, "token id")


def whole_pages(
    token_ids: npt.ArrayLike, pages: npt.ArrayLike, page_size: int, windows: Sequence[int | None]
) -> tuple[Int32, Int32]:
    """A sequence's whole pages of tokens, and as many page ids in each group, ``[groups, n]``.

    Raises:
        ShapeError: arrays of a wrong shape or dtype, another number of pages, or a null page of full attention.
    """
    tokens = token_vector(token_ids)
    if len(windows) == 1 and isinstance(pages, np.ndarray) and pages.dtype == np.int32 and pages.ndim in (1, 2):
        page_ids: Int32 = np.atleast_2d(pages)  # a view: the pool knows the arrays that it has handed out
    else:
        page_ids = _within_int32("pages", integers_by_group("pages", pages, len(windows)), "page")
    full = tokens.size // page_size
    if page_ids.shape != (len(windows), full):
        each = "" if len(windows) == 1 else f" in each of {len(windows)} groups"
        raise ShapeError(
            f"{page_ids.shape[1]} pages of {page_size} for {tokens.size} tokens; pass the {full} full ones{each}, "
            "without the partial last page"
        )
    for group, window in enumerate(windows if len(windows) > 1 else ()):
        if window is None and not page_ids[group].all():
            raise ShapeError(
                f"page {page_ids[group].argmin()} of group {group} is the null page: full attention keeps all"
            )
    return tokens[: page_ids.shape[1] * page_size], page_ids


def _int32_vector(name: str, values: npt.ArrayLike, each: str) -> Int32:
    if isinstance(values, np.ndarray) and values.dtype == np.int32 and values.ndim == 1:
        return values
    return _within_int32(name, integer_vector(name, values), each)


def _within_int32(name: str, wide: Int64, each: str) -> Int32:
    narrow: Int32 = wide.astype(np.int32)
    if (narrow != wide).any():
        raise ShapeError(f"{each} {wide[narrow != wide][0]} is beyond int32; {name} are int32")
    return narrow
