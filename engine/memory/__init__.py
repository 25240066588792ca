"""The control plane: which page belongs to whom. NumPy and Python only.

This room hands out pages and rows, remembers prefixes, and plans page moves. It never imports jax, never touches a
buffer, and never waits for a device: integers go out, and whoever runs steps makes the moves.

    manager         CacheManager, the face of the room: admit, grow, mark_computed, publish, fork, truncate, release
    rows            ReqToTokenPool, the row table: one column for each fact of a row
    admission       the rule by which requests are admitted
    prefix_search   what there is of a request's tokens on the device and on the host
    page_moves      PageCopy, PageLoad, EvictedPages: what the device must copy before the next step
    scope           CacheScope: what must be equal, beside the tokens, for cached pages to be the right ones
    media_tokens    ids by which prompts with images are told apart
    pages/          the pool of pages: holders and free runs; the slot-level contract over it
    prefix/         the prefix cache: tree, eviction
    offload/        pages outside of the device: host tier, saved prefixes
    pool_snapshot   what every page of a pool is at one moment, for metrics
    saved_segments  what a save of the prefix cache writes
    one_caller      refuses two threads at once, and forks of the process
    integers        checks of integers and integer arrays
"""

from engine.memory.admission import Admission
from engine.memory.manager import CacheManager
from engine.memory.media_tokens import media_tokens
from engine.memory.offload import HostTier, PageFormat, PrefixSegment
from engine.memory.page_moves import PageCopy, PageLoad, PageMove
from engine.memory.pages import PagedTokenToKVPoolAllocator, PageIds, PagePool, Slots
from engine.memory.prefix import EventsMissed, EvictedPages, PagesCached, PagesLost, PrefixesForgotten, RadixCache
from engine.memory.rows import ReqToTokenPool
from engine.memory.scope import Adapter, CacheScope, LayoutKey

__all__ = [
    "Adapter",
    "Admission",
    "CacheManager",
    "CacheScope",
    "EventsMissed",
    "EvictedPages",
    "HostTier",
    "LayoutKey",
    "PageCopy",
    "PageFormat",
    "PageIds",
    "PageLoad",
    "PageMove",
    "PagePool",
    "PagedTokenToKVPoolAllocator",
    "PagesCached",
    "PagesLost",
    "PrefixSegment",
    "PrefixesForgotten",
    "RadixCache",
    "ReqToTokenPool",
    "Slots",
    "media_tokens",
]
