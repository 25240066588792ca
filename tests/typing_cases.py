"""What a type checker must refuse: mypy reads this file, and an ignore that hides nothing is an error.

Nothing runs it. Pages and slots are both int32 arrays; their types keep one from being given where the other is meant.
"""

from __future__ import annotations

import numpy as np

from engine.memory.offload import PrefixSegment
from engine.memory.pages import PagedTokenToKVPoolAllocator, PageIds, Slots
from engine.memory.prefix import RadixCache
from engine.memory.rows import ReqToTokenPool
from engine.memory.scope import CacheScope


def pages_are_released_and_slots_are_freed(allocator: PagedTokenToKVPoolAllocator, table: ReqToTokenPool) -> None:
    pages, slots = allocator.pages.take([2, 3]), allocator.alloc(4)
    allocator.pages.retain(pages)
    allocator.pages.release(pages)
    allocator.free(slots)
    allocator.free(pages)  # type: ignore[arg-type]
    allocator.pages.release(slots)  # type: ignore[arg-type]
    allocator.pages.retain(slots)  # type: ignore[arg-type]

    allocator.free(allocator.alloc_extend([0], [9], [-1]))
    allocator.free(allocator.alloc_decode([10], table.last_loc([0], [9])))
    allocator.free(table.slots(0, 0, 9))
    allocator.pages.release(table.slots(0, 0, 9))  # type: ignore[arg-type]
    allocator.pages.release(table.release(0))
    allocator.free(table.release(0))  # type: ignore[arg-type]
    allocator.free(table.row_pages(0))  # type: ignore[arg-type]
    allocator.free(table.full_pages(0, 9))  # type: ignore[arg-type]
    allocator.free(allocator.pages.take_singles(2))  # type: ignore[arg-type]


def a_plain_array_says_what_it_holds(allocator: PagedTokenToKVPoolAllocator) -> None:
    numbers = np.arange(4, dtype=np.int32)
    allocator.free(numbers)  # type: ignore[arg-type]
    allocator.pages.release(numbers)  # type: ignore[arg-type]
    allocator.free(Slots(numbers))
    allocator.pages.release(PageIds(numbers))
    allocator.free([4, 5, 6, 7])
    allocator.pages.release([1, 2])


def cached_pages_are_pages(
    allocator: PagedTokenToKVPoolAllocator, cache: RadixCache, scope: CacheScope, segment: PrefixSegment
) -> None:
    found = cache.match(scope, segment.token_ids, whole=True)
    allocator.pages.retain(found.pages)
    allocator.free(found.pages)  # type: ignore[arg-type]
