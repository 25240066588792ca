"""What there is of a request's tokens, on the device and on the host, and after how many of them it can go on.

On the device the prefix cache has entries, in full attention with their pages, and of windows some pages; the host tier
has pages of each group. A request can go on after ``n`` pages if every page of full attention up to there is on one of
the two, and of each window the last pages before it (``longest_hit``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.memory.integers import Bool, Int32
from engine.memory.offload import HostTier
from engine.memory.prefix import PrefixMatch, RadixCache, longest_hit, pages_seen, runs_of
from engine.memory.scope import CacheScope


@dataclass(frozen=True)
class PageRun:
    """Pages ``start`` to ``stop - 1`` of a sequence in one group."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class FoundPrefix:
    """What a request need not compute.

    Attributes:
        match: the part that is on the device, to be locked.
        pages: int32 ``[groups, n]`` the pages of that part that the request will see, 0 for others.
        loads: what is to be loaded from the host, in the order of the groups.
        num_pages: pages of tokens in all.
    """

    match: PrefixMatch
    pages: Int32
    loads: Sequence[PageRun] = ()
    num_pages: int = 0


def find_on_device(prefix: RadixCache, scope: CacheScope, tokens: Int32) -> FoundPrefix:
    """The longest prefix after which a request can go on with pages of the device alone; changes nothing."""
    match = prefix.match(scope, tokens)
    return _on_device(prefix, match, match.pages.size)


def find_prefix(prefix: RadixCache, tier: HostTier | None, scope: CacheScope, tokens: Int32) -> FoundPrefix:
    """The longest prefix after which a request can go on with pages of the device and the host; changes nothing."""
    if tier is None or not tier.holds(scope):
        return find_on_device(prefix, scope, tokens)
    entries = prefix.match_entries(scope, tokens)
    here = prefix.pages_of(entries) > 0
    known, groups = entries.pages.size, range(len(prefix.windows))
    there = np.stack([tier.held(scope, tokens[:-1], group=group) for group in groups])
    has = there.copy()
    has[:, :known] |= here
    full = [group for group in groups if prefix.windows[group] is None]
    everywhere: Bool = np.all(has[full], axis=0)
    has = has[:, : everywhere.size if everywhere.all() else int(everywhere.argmin())]
    seen = {group: pages_seen(window, prefix.page_size) for group, window in enumerate(prefix.windows) if window}
    count = longest_hit(has[list(seen)], list(seen.values()))
    found = _on_device(prefix, prefix.beginning(entries, min(count, known)), count)
    loads = []
    for group in groups:
        first = max(0, count - seen[group]) if group in seen else 0
        missing = np.ones(count, np.bool_)
        missing[:first] = False
        missing[: min(count, known)] &= ~here[group, :count]
        loads += [PageRun(group, start, stop) for start, stop in runs_of(missing.astype(np.int32))]
    return FoundPrefix(found.match, found.pages, loads, count)


def _on_device(prefix: RadixCache, match: PrefixMatch, count: int) -> FoundPrefix:
    """A match, with the pages that a request sees that goes on after ``count`` pages."""
    pages = prefix.pages_of(match)
    for group, window in enumerate(prefix.windows):
        if window is not None:
            pages[group, : max(0, count - pages_seen(window, prefix.page_size))] = 0
    return FoundPrefix(match, pages, (), count)
