"""The pool of pages: how many holders each page has, which are free, and the slot-level contract over it.

It knows page ids, slots and counts; it never knows a request, a token or what a page contains.

    page_pool       reference counts, births, which pages are free: take, retain, release
    free_runs       the free pages, as runs of neighbours
    slot_allocator  alloc, alloc_extend, alloc_decode, free: a thin adapter from slots to pages
    handouts        which arrays were handed out, and when
"""

from engine.memory.pages.page_pool import NO_PAGES, PageIds, PagePool, PoolState
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator, Slots

__all__ = ["NO_PAGES", "PageIds", "PagePool", "PagedTokenToKVPoolAllocator", "PoolState", "Slots"]
