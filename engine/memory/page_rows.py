"""What page-table rows hold: which pages, how many tokens, and where these lie."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, IntegrityError, ShapeError
from engine.memory.integers import (
    Int32,
    Int64,
    equal_lengths,
    integer_vector,
    is_integer,
    positive_option,
    whole_number,
)
from engine.memory.one_caller import OneCaller
from engine.memory.pages import PageIds, Slots


class PageRows:
    """The rows of a page table and all that can be asked of them; ``ReqToTokenPool`` changes them.

    Args:
        max_requests: rows.
        max_context_tokens: most tokens of one request.
        page_size: tokens a page.

    Raises:
        ConfigError: a value is not a positive integer.
    """

    def __init__(self, max_requests: int, max_context_tokens: int, page_size: int) -> None:
        self.max_requests = positive_option("max_requests", max_requests)
        self.max_context_tokens = positive_option("max_context_tokens", max_context_tokens)
        self.page_size = positive_option("page_size", page_size)
        self.max_pages = -(-self.max_context_tokens // self.page_size)
        try:
            self._table = np.zeros((self.max_requests, self.max_pages), np.int32)
        except (MemoryError, ValueError) as error:
            raise ConfigError(
                f"cannot reserve a page table of {self.max_requests} rows of {self.max_pages} pages: {error}; lower "
                "max_requests or max_context_tokens"
            ) from error
        self._kv_lens = np.zeros(self.max_requests, np.int32)
        self._in_use = np.zeros(self.max_requests, np.bool_)
        self._releases = np.zeros(self.max_requests, np.int64)  # how often each row was given back
        self._taken = np.zeros(self.max_requests, np.int64)  # pages of each row that take_new_pages has given out
        # First in, first out: a row that was just released is the last to be reused, so a stale index is seen.
        self._free_rows = deque(range(self.max_requests))
        self.caller = OneCaller()

    @property
    def available_rows(self) -> int:
        """Rows that no request has."""
        return len(self._free_rows)

    def rows_in_use(self) -> Int32:
        """The rows that requests have, ascending; int32 ``[n]``, fresh."""
        return np.flatnonzero(self._in_use).astype(np.int32)

    def rows(self, req_pool_indices: npt.ArrayLike) -> Int32:
        """The page-table rows of a batch; int32 ``[B, max_pages]``, a fresh copy each time.

        Raises:
            ShapeError: not an integer vector of rows in use.
        """
        return self._table[self._checked_rows(req_pool_indices, distinct=False)]

    def kv_lens(self, req_pool_indices: npt.ArrayLike) -> Int32:
        """Tokens in each row; int32 ``[B]``, fresh.

        Raises:
            ShapeError: not an integer vector of rows in use.
        """
        return self._kv_lens[self._checked_rows(req_pool_indices, distinct=False)]

    def kv_len(self, row: int) -> int:
        """Tokens in one row.

        Raises:
            ShapeError: not a row in use.
        """
        if not self.is_in_use(row):
            raise ShapeError(f"row {row!r} of {self.max_requests} is not in use; get it from alloc_row first")
        return self._kv_lens.item(row)

    def is_in_use(self, row: int) -> bool:
        """Whether ``row`` is one that a request has."""
        # Not through an array of one row: this is asked for each request that comes or goes.
        return is_integer(row) and 0 <= row < self.max_requests and self._in_use.item(row)

    def row_pages(self, row: int) -> PageIds:
        """The pages of one row in order; int32 ``[n]``, fresh.

        Raises:
            ShapeError: not a row in use.
        """
        return PageIds(self._table[row, : -(-self.kv_len(row) // self.page_size)].copy())

    def full_pages(self, row: int, tokens: int) -> PageIds:
        """Those pages of one row that its first ``tokens`` tokens, or all that it has, fill; int32 ``[n]``, fresh.

        Raises:
            ShapeError: not a row in use, or ``tokens`` is not an integer, 0 or more.
        """
        length = min(self.kv_len(row), whole_number("tokens", tokens))
        return PageIds(self._table[row, : length // self.page_size].copy())

    def held_pages(self) -> PageIds:
        """The pages of all rows, a shared page once per row; int32 ``[n]``, for the allocator's integrity check."""
        return PageIds(self._table[self._table != 0])

    def slots(self, row: int, start: int, stop: int) -> Slots:
        """Slots of tokens ``start`` to ``stop - 1`` of a row; int32 ``[stop - start]``.

        Raises:
            ShapeError: not a row in use, or the row has no such tokens.
        """
        length = self.kv_len(row)
        if not (is_integer(start) and is_integer(stop) and 0 <= start <= stop <= length):
            raise ShapeError(f"row {row} has no tokens {start} to {stop}; it has {length}, counted from 0")
        return self._slots_at(np.array([row]), np.arange(start, stop))

    def last_loc(self, rows: npt.ArrayLike, lens: npt.ArrayLike) -> Slots:
        """Slot of token ``lens - 1`` of each row, -1 where ``lens`` is 0; int32 ``[B]``.

        Args:
            rows: ``[B]`` rows in use.
            lens: ``[B]`` tokens, at most those in the row.

        Raises:
            ShapeError: not rows in use, or a row has fewer tokens.
        """
        index, counts = self._checked_rows(rows, distinct=False), integer_vector("lens", lens)
        equal_lengths(rows=index, lens=counts)
        right = (counts >= 0) & (counts <= self._kv_lens[index])
        if not right.all():
            at = int(right.argmin())
            raise ShapeError(f"row {index[at]} has no token {counts[at] - 1}; it has {self._kv_lens[index[at]]} tokens")
        slots = self._slots_at(index, np.maximum(counts - 1, 0))
        slots[counts == 0] = -1
        return slots

    def check_integrity(self) -> None:
        """Proves that each row holds just the pages of its tokens and that a free row is empty.

        Raises:
            IntegrityError: names the first wrong row.
        """
        expected = np.arange(self.max_pages) < -(-self._kv_lens // self.page_size)[:, None]
        wrong = ((self._table > 0) != expected).any(axis=1) | (self._table < 0).any(axis=1)
        wrong |= ~self._in_use & (self._kv_lens > 0)
        free = np.bincount(np.array(self._free_rows, np.int64), minlength=self.max_requests)
        wrong |= free + self._in_use != 1
        if wrong.any():
            row = int(wrong.argmax())
            raise IntegrityError(
                f"page-table row {row} has {np.count_nonzero(self._table[row])} pages and {self._kv_lens[row]} tokens, "
                f"is {'' if self._in_use[row] else 'not '}in use and {free[row]} times free; this is a bug, report it"
            )

    def _pages_of(self, lens: npt.NDArray[Any]) -> Int64:
        """Pages that hold ``lens`` tokens."""
        pages: Int64 = (lens + (self.page_size - 1)).astype(np.int64) // self.page_size
        return pages

    def _slots_at(self, rows: Int64, positions: Int64) -> Slots:
        page, offset = np.divmod(positions, self.page_size)
        return Slots((self._table[rows, page].astype(np.int64) * self.page_size + offset).astype(np.int32))

    def _checked_rows(self, rows: npt.ArrayLike, *, distinct: bool = True) -> Int64:
        index = integer_vector("rows", rows)
        if index.size and (index.min() < 0 or index.max() >= self.max_requests):
            raise ShapeError(f"rows go from {index.min()} to {index.max()}; the table has 0 to {self.max_requests - 1}")
        if not self._in_use[index].all():
            raise ShapeError(f"row {index[self._in_use[index].argmin()]} is not in use; get it from alloc_row first")
        if distinct and index.size > 1 and np.bincount(index).max() > 1:
            raise ShapeError(f"row {np.bincount(index).argmax()} is listed more than once; list each row once a call")
        return index
