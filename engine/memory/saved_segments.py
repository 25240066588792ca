"""The contents of a save: every page that is cached, on the device or on the host, once; nothing is evicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from engine.memory.integers import Int32
from engine.memory.manager import CacheManager
from engine.memory.offload import Pages, PrefixSegment
from engine.memory.prefix import RadixCache, runs_of
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
        begin, group = segment.first_page, segment.group
        end = begin + len(segment.data)
        for start, stop in _missing_runs(prefixes, segment.scope, segment.token_ids, group, begin, end):
            data = segment.data[start - begin : stop - begin]
            yield PrefixSegment(segment.scope, segment.token_ids[: stop * page_size], start, data, group)
    for index, prefix in enumerate(prefixes):
        for scope, tokens, pages, group in prefix.runs():
            end = tokens.size // page_size
            begin = end - pages.size
            for first, last in _missing_runs(prefixes[:index], scope, tokens, group, begin, end):
                for start in reversed(range(first, last, batch)):
                    stop = min(start + batch, last)
                    data = read(index, pages[start - begin : stop - begin])
                    yield PrefixSegment(scope, tokens[: stop * page_size], start, data, group)


def _missing_runs(
    prefixes: Sequence[RadixCache], scope: CacheScope, tokens: Int32, group: int, begin: int, end: int
) -> list[tuple[int, int]]:
    """Which of a sequence's pages ``begin`` to ``end - 1`` of a group no prefix cache has, in runs, the last first."""
    missing = np.ones(end - begin, np.int32)
    for prefix in prefixes:
        held = prefix.pages_of(prefix.match_entries(scope, tokens, whole=True))[group, begin:end]
        missing[: held.size][held > 0] = 0
    return [(begin + start, begin + stop) for start, stop in runs_of(missing)][::-1]
