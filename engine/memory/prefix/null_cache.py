"""A prefix cache that keeps nothing, so that its owner need not ask whether there is one."""

from __future__ import annotations

from collections.abc import Sequence

from engine.memory.pages import PagedTokenToKVPoolAllocator
from engine.memory.prefix.cache import RadixCache
from engine.memory.prefix.match import PrefixMatch, checked_scope
from engine.memory.scope import CacheScope


class NullPrefixCache(RadixCache):
    """A ``RadixCache`` that accepts no scope: it finds and keeps nothing, and counts no query.

    Arguments are checked and locks are counted as there, so that a mistake is refused with either cache.

    Args:
        allocator: allocator of the pool that the cache would serve.
        windows: as there.
    """

    def __init__(self, allocator: PagedTokenToKVPoolAllocator, windows: Sequence[int | None] = (None,)) -> None:
        super().__init__(allocator, allocator.page_size, windows=windows)

    def record(self, match: PrefixMatch) -> None:
        """Counts nothing; raises DoubleFreeError where the match is of another cache."""
        self._require_current(match)

    def _accepts(self, scope: CacheScope) -> bool:
        checked_scope(scope)
        return False
