"""A prefix cache that keeps nothing, so that its owner need not ask whether there is one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from engine.errors import DoubleFreeError
from engine.memory.integers import Bool, Int32, integer_vector, priority_level, whole_number
from engine.memory.pages import NO_PAGES, PageIds
from engine.memory.prefix.cache import RadixCache
from engine.memory.prefix.match import PrefixMatch, checked_scope, name_of, require_locked, token_vector
from engine.memory.scope import CacheScope


class NullPrefixCache:
    """Has the calls of ``RadixCache``, finds nothing and keeps nothing; its counters stay at zero.

    Arguments are read and locks are counted as there, so that a mistake is refused whichever cache there is.
    """

    evictable_pages = protected_pages = cached_pages = 0

    def __init__(self) -> None:
        self.query_tokens = 0
        self.hit_tokens = 0
        self.evicted_pages = 0

    def is_cached(self, pages: npt.ArrayLike) -> Bool:
        """None of the pages; bool ``[n]``; raises ShapeError where they are not an integer vector."""
        return np.zeros(integer_vector("pages", pages).size, np.bool_)

    def pages(self) -> PageIds:
        """No pages."""
        return NO_PAGES

    def runs(self) -> Iterator[tuple[CacheScope, Int32, Int32]]:
        """No runs."""
        return iter(())

    def match(self, scope: CacheScope, token_ids: npt.ArrayLike, *, whole: bool = False) -> PrefixMatch:
        """An empty match; raises as ``RadixCache.match``."""
        tokens = token_vector(token_ids)
        checked_scope(scope)
        return PrefixMatch(NO_PAGES, 0, tokens.size, self, None)

    def lock(self, match: PrefixMatch) -> None:
        """Counts a lock; raises DoubleFreeError where the match is of another cache."""
        self.record(match)
        match.locks += 1

    def unlock(self, match: PrefixMatch) -> None:
        """Takes back one ``lock``; raises DoubleFreeError where there is none."""
        require_locked(match, self)
        match.locks -= 1

    def record(self, match: PrefixMatch) -> None:
        """Counts nothing; raises DoubleFreeError where the match is of another cache."""
        if getattr(match, "owner", None) is not self:
            raise DoubleFreeError(f"cannot use {name_of(match)}: it is of another cache; match again")

    def insert(self, scope: CacheScope, token_ids: npt.ArrayLike, pages: npt.ArrayLike, *, priority: int = 0) -> int:
        """Caches nothing; 0 tokens were cached already."""
        self._read(scope, token_ids, priority)
        return 0

    def advance(
        self,
        match: PrefixMatch,
        scope: CacheScope,
        token_ids: npt.ArrayLike,
        pages: npt.ArrayLike,
        *,
        priority: int = 0,
    ) -> PrefixMatch:
        """Caches nothing and returns the handle; raises DoubleFreeError where it is not locked."""
        require_locked(match, self)
        self._read(scope, token_ids, priority)
        return match

    def finish(
        self,
        match: PrefixMatch,
        scope: CacheScope,
        token_ids: npt.ArrayLike,
        pages: npt.ArrayLike,
        *,
        priority: int = 0,
    ) -> None:
        """Caches nothing and takes back the lock; raises DoubleFreeError where there is none."""
        self.unlock(self.advance(match, scope, token_ids, pages, priority=priority))

    def evict(self, num_pages: int) -> int:
        """Releases nothing; raises ShapeError where ``num_pages`` is not an integer, 0 or more."""
        whole_number("cannot evict: num_pages", num_pages)
        return 0

    def reset(self, scope: CacheScope | None = None) -> int:
        """Releases nothing."""
        return 0

    def raise_weights_epoch(self, model: str, epoch: int) -> None:
        """Nothing was computed with any weights."""

    def clear(self) -> None:
        """Forgets nothing."""

    def check_integrity(self) -> None:
        """There is nothing to be wrong."""

    def _read(self, scope: CacheScope, token_ids: npt.ArrayLike, priority: int) -> None:
        checked_scope(scope)
        token_vector(token_ids)
        priority_level(priority)


PrefixCache = RadixCache | NullPrefixCache
