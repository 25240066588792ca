"""What a save writes: every page that is cached, on the device or on the host, each once; nothing is evicted for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engine.memory.integers import Int32
from engine.memory.manager import CacheManager
from engine.memory.offload import PrefixSegment
from engine.memory.prefix.cache import RadixCache
from engine.memory.scope import CacheScope

BATCH_BYTES = 64 << 20  # of pages read at once
BATCH_PAGES = 64  # the most that one copy from the device takes


def cached_segments(caches: Sequence[CacheManager]) -> Iterator[PrefixSegment]:
    """Reads all cached pages, a batch at a time, and changes nothing; none of the caches may change meanwhile.

    The longest unused come first, and of a sequence its end before its beginning: put into a host tier in this order
    they are all there again, or where it is smaller what was used last, from the beginning of a sequence on.

    Args:
        caches: of the replicas, which share one host tier; what several of them hold comes once.
    """
    host = caches[0].host
    if host is None:
        return
    page_size = host.tier.page_format.page_size
    batch = max(1, min(BATCH_PAGES, BATCH_BYTES // host.tier.page_format.page_bytes))
    prefixes = [cache.prefix for cache in caches if cache.prefix is not None]
    for segment in host.tier.segments(batch):
        known = _cached_pages(prefixes, segment.scope, segment.token_ids) - segment.first_page
        if known < len(segment.data):
            skipped = max(known, 0)
            first, data = segment.first_page + skipped, segment.data[skipped:]
            yield PrefixSegment(segment.scope, segment.token_ids, first, data)
    for index, cache in enumerate(caches):
        if cache.prefix is None or cache.host is None:
            continue
        for scope, tokens, pages in cache.prefix.runs():
            end = tokens.size // page_size
            begin = end - pages.size
            for start in reversed(range(max(begin, _cached_pages(prefixes[:index], scope, tokens)), end, batch)):
                stop = min(start + batch, end)
                data = cache.host.mover.read(pages[start - begin : stop - begin])
                yield PrefixSegment(scope, tokens[: stop * page_size], start, data)


def _cached_pages(prefixes: Sequence[RadixCache], scope: CacheScope, tokens: Int32) -> int:
    """How many pages of a sequence's beginning one of the prefix caches has."""
    longer = np.append(tokens, np.int32(0))  # a match leaves out the last token
    return max((prefix.match(scope, longer).pages.size for prefix in prefixes), default=0)
