"""Joins the allocator and the page table: what a request's memory goes through between admission and release."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.errors import KVPoolExhausted, ShapeError
from engine.memory.page_allocator import PagedTokenToKVPoolAllocator
from engine.memory.page_table import ReqToTokenPool

Int32 = npt.NDArray[np.int32]


class CacheManager:
    """Pages and page-table rows of the running requests.

    A request is admitted only if every page that it may ever need can be promised beside those promised already, so
    a running request never finds the pool exhausted.

    Args:
        size: usable token slots, a multiple of ``page_size``.
        page_size: tokens a page.
        max_requests: page-table rows.
        max_context_tokens: most tokens of one request.
    """

    def __init__(self, size: int, page_size: int, max_requests: int, max_context_tokens: int) -> None:
        self.size = size
        self.page_size = page_size
        self.allocator = PagedTokenToKVPoolAllocator(size, page_size)
        self.page_table = ReqToTokenPool(max_requests, max_context_tokens, page_size)
        self._promised = np.zeros(max_requests, np.int64)

    def round_up(self, tokens: int) -> int:
        """``tokens`` in whole pages, counted in tokens."""
        return -(-tokens // self.page_size) * self.page_size

    @property
    def held_tokens(self) -> int:
        """Tokens in pages that are held."""
        return self.size - self.allocator.available_size()

    def can_admit(self, max_tokens: int) -> bool:
        """Whether a request of up to ``max_tokens`` can be promised all its pages now."""
        return self.round_up(max_tokens) <= self.size - int(self._promised.sum())

    def admit(self, max_tokens: int) -> int:
        """Promises a request its pages and returns its page-table row.

        Raises:
            ShapeError: ``max_tokens`` is not from 1 to the context.
            KVPoolExhausted: the promises would exceed the pool.
        """
        if not 1 <= max_tokens <= self.page_table.max_context_tokens:
            raise ShapeError(
                f"cannot promise {max_tokens} tokens: a request has from 1 to {self.page_table.max_context_tokens}"
            )
        needed, free = self.round_up(max_tokens), self.size - int(self._promised.sum())
        if needed > free:
            raise KVPoolExhausted(
                f"cannot promise {needed} tokens: {free} of {self.size} are not promised to running requests; "
                "wait for one to finish or raise max_total_tokens",
                requested=needed,
                available=free,
            )
        row = self.page_table.alloc_row()
        self._promised[row] = needed
        return row

    def grow(self, rows: Int32, counts: Int32) -> Int32:
        """Gives each row slots for ``counts`` more tokens; int32 ``[sum(counts)]``. All rows or none.

        Raises:
            ShapeError: a row is not in use, or would exceed the context.
            KVPoolExhausted: the pool has too few free pages.
        """
        starts = self.page_table.kv_lens(rows).astype(np.int64)
        if starts.shape != counts.shape or np.unique(rows).size != starts.size or (starts.size and counts.min() < 0):
            raise ShapeError(
                f"cannot grow rows {rows.tolist()} by {counts.tolist()} tokens: give distinct rows, a count for each"
            )
        ends = starts + counts
        if ends.size and ends.max() > self.page_table.max_context_tokens:
            raise ShapeError(
                f"row {rows[ends.argmax()]} would grow to {ends.max()} tokens; a row holds at most "
                f"{self.page_table.max_context_tokens}; raise max_context_tokens"
            )
        # All that the page table could refuse has been checked: nothing stands between taking pages and noting them.
        slots = self.allocator.alloc_extend(starts, ends, self.page_table.last_loc(rows, starts))
        self.page_table.write_slots(rows, starts, counts, slots)
        return slots

    def release(self, row: int) -> None:
        """Gives back a row and its pages."""
        self.allocator.release(self.page_table.release(row))
        self._promised[row] = 0

    def check_integrity(self) -> None:
        """Proves that the allocator holds exactly the pages of the live rows; raises IntegrityError if not."""
        self.page_table.check_integrity()
        self.allocator.check_integrity(self.page_table.held_pages())
