"""The slow and obvious allocator that the real one is compared with, and how two states are compared."""

from __future__ import annotations

import numpy as np

from engine.memory.pages import PagedTokenToKVPoolAllocator, PoolState


class Model:
    """Holders per page, and how often it was handed out, in dicts."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.holders = dict.fromkeys(range(1, num_pages + 1), 0)
        self.times_taken = dict.fromkeys(self.holders, 0)

    @property
    def free_pages(self) -> set[int]:
        return {page for page, count in self.holders.items() if count == 0}

    def take(self, pages: set[int]) -> None:
        assert pages <= self.free_pages, "a held page was handed out"
        for page in pages:
            self.holders[page] = 1
            self.times_taken[page] += 1

    def drop(self, pages: set[int]) -> None:
        for page in pages:
            self.holders[page] -= 1

    def agree(self, allocator: PagedTokenToKVPoolAllocator) -> None:
        assert allocator.pages.available == len(self.free_pages)
        assert allocator.available_size() == len(self.free_pages) * self.page_size
        counts = allocator.pages.ref_count(np.arange(len(self.holders) + 1))
        assert counts.tolist() == [0, *self.holders.values()]
        allocator.check_integrity(np.repeat(list(self.holders), list(self.holders.values())))


def fingerprint(state: PoolState) -> tuple[object, ...]:
    """All that an allocator's behaviour depends on."""
    free = state.free
    order = (free.runs, free.singles.tolist(), [pages.tolist() for pages in free.loose])
    return (state.num_pages, state.page_size, state.ref_count.tolist(), state.births.tolist(),
            state.clock, order)  # fmt: skip


def pages_of(slots: np.ndarray, page_size: int) -> set[int]:
    return set((slots // page_size).tolist())
