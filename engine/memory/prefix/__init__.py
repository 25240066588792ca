"""The prefix cache: pages of past sequences, found by their tokens.

It knows scopes, tokens and page ids; it never knows a request or a page-table row, and never reads a page.

    cache        RadixCache: match, lock, insert, advance, evict; holds a reference to each page that it keeps
    null_cache   NullPrefixCache: a RadixCache that keeps nothing
    entry_pages  EntryPages: the pages of every group by entry, and the order in which those of windows are evicted
    events       CacheEvents: what was cached and lost, for others
    match        what goes in and out: matches, evicted pages, checked arguments
    tree         the nodes, the radix tree of one scope, and the forest that makes every change of a node
    eviction     in which order nodes are evicted
"""

from engine.memory.prefix.cache import EvictionPolicyName, RadixCache
from engine.memory.prefix.entry_pages import longest_hit, pages_seen, runs_of
from engine.memory.prefix.events import CacheEvent, EventsMissed, PagesCached, PagesLost, PrefixesForgotten
from engine.memory.prefix.match import EvictedPages, PrefixMatch, checked_scope, token_vector
from engine.memory.prefix.null_cache import NullPrefixCache

__all__ = [
    "CacheEvent",
    "EventsMissed",
    "EvictedPages",
    "EvictionPolicyName",
    "NullPrefixCache",
    "PagesCached",
    "PagesLost",
    "PrefixMatch",
    "PrefixesForgotten",
    "RadixCache",
    "checked_scope",
    "longest_hit",
    "pages_seen",
    "runs_of",
    "token_vector",
]
