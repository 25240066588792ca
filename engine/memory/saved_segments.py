"""The contents of a save: every page that is cached, on the device or on the host, once; nothing is evicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from engine.memory.integers import Int32
from engine.memory.manager import CacheManager
from engine.memory.offload import Pages, PrefixSegment
from engine.memory.prefix import RadixCache
from engine.memory.scope import CacheScope

BATCH_BYTES = 64 << 20  # bytes of pages read at once
BATCH_PAGES = 64  # the most that one copy from the device takes


def cached_segments(caches: Sequence[CacheManager], read: Callable[[int, Int32], Pages]) -> Iterator[PrefixSegment]:
    """Reads all cached pages, one batch at a time, and changes nothing; none of the caches may change in the meantime.

    The longest unused pages come first, and the end of a sequence before its beginning. A host tier that takes them in
    this order holds them all, or if it is smaller those used last, from the beginning of a sequence on.

    Args:
        caches: the caches of the replicas, which share one host tier; pages that several of them hold come once.
        read: copies pages, int32 ``[n]``, of a replica to the host, ``[n, layers, page_size, 2H, D]``.
    """
    tier = caches[0].host_tier
    if tier is None:
        return
    page_size = tier.page_format.page_size
    batch = max(1, min(BATCH_PAGES, BATCH_BYTES // tier.page_format.page_bytes))
    prefixes = [cache.prefix for cache in caches]
    for segment in tier.segments(batch):
        known = _cached_pages(prefixes, segment.scope, segment.token_ids) - segment.first_page
        if known < len(segment.data):
            skipped = max(known, 0)
            first, data = segment.first_page + skipped, segment.data[skipped:]
            yield PrefixSegment(segment.scope, segment.token_ids, first, data)
    for index, prefix in enumerate(prefixes):
        for scope, tokens, pages in prefix.runs():
            end = tokens.size // page_size
            begin = end - pages.size
            for start in reversed(range(max(begin, _cached_pages(prefixes[:index], scope, tokens)), end, batch)):
                stop = min(start + batch, end)
                data = read(index, pages[start - begin : stop - begin])
                yield PrefixSegment(scope, tokens[: stop * page_size], start, data)


def _cached_pages(prefixes: Sequence[RadixCache], scope: CacheScope, tokens: Int32) -> int:
    """How many pages of a sequence's beginning one of the prefix caches has."""
    return max((prefix.match(scope, tokens, whole=True).pages.size for prefix in prefixes), default=0)
