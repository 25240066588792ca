"""The page table: which pages hold the tokens of each running request.

Rows of page ids, as the block tables of PagedAttention (arXiv 2309.06180); the name ``ReqToTokenPool`` is SGLang's,
whose table holds a slot a token: here it is one entry a page.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import DoubleFreeError, IntegrityError, KVPoolExhausted, ShapeError
from engine.memory.decoding_rows import DecodingRows
from engine.memory.integers import (
    INT32_MAX,
    Int32,
    Int64,
    equal_lengths,
    integer_vector,
    positive_option,
    ranges,
)
from engine.memory.row_growth import RowGrowth, check_continues, check_new_pages


class ReqToTokenPool:
    """One row of page ids per running request: int32 ``[max_requests, max_pages]``, 0 where there is no page.

    A row grows at its end only: token ``p`` lies in page ``row[p // page_size]`` at offset ``p % page_size``. The
    table says where pages are, not who else holds them: that is the allocator's to know. Whatever is returned is a
    copy, because the CPU backend may alias a NumPy buffer that a running step still reads.

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
        self._table = np.zeros((self.max_requests, self.max_pages), np.int32)
        self._kv_lens = np.zeros(self.max_requests, np.int32)
        self._in_use = np.zeros(self.max_requests, np.bool_)
        self._releases = np.zeros(self.max_requests, np.int64)  # how often each row was given back
        self._taken = np.zeros(self.max_requests, np.int64)  # pages of each row that take_new_pages has given out
        # First in, first out: a row that was just released is the last to be reused, so a stale index is seen.
        self._free_rows = deque(range(self.max_requests))

    @property
    def available_rows(self) -> int:
        """Rows that no request has."""
        return len(self._free_rows)

    def rows_in_use(self) -> Int32:
        """The rows that requests have, ascending; int32 ``[n]``, fresh."""
        return np.flatnonzero(self._in_use).astype(np.int32)

    def alloc_row(self) -> int:
        """Gives a request an empty row, see ``alloc_rows``."""
        return int(self.alloc_rows(1)[0])

    def alloc_rows(self, count: int) -> Int32:
        """Gives requests empty rows.

        Args:
            count: rows.

        Returns:
            int32 ``[count]`` request indices (``req_pool_idx``).

        Raises:
            ShapeError: ``count`` is negative.
            KVPoolExhausted: fewer rows are free; ``requested`` and ``available`` are those rows' tokens of context.
        """
        if count < 0:
            raise ShapeError(f"cannot allocate {count} rows; the count must be 0 or more")
        if count > len(self._free_rows):
            raise KVPoolExhausted(
                f"cannot allocate {count} page-table rows: {len(self._free_rows)} of {self.max_requests} are free; "
                "wait for a request to finish or raise max_requests",
                requested=count * self.max_context_tokens,
                available=len(self._free_rows) * self.max_context_tokens,
            )
        rows = np.array([self._free_rows.popleft() for _ in range(count)], np.int32)
        self._in_use[rows] = True
        return rows

    def release(self, row: int) -> Int32:
        """Takes a row back and clears it.

        Returns:
            int32 ``[n]`` the pages that it held, for the allocator to release.

        Raises:
            DoubleFreeError: no request has this row.
        """
        if not isinstance(row, int | np.integer) or not 0 <= row < self.max_requests or not self._in_use[row]:
            raise DoubleFreeError(
                f"cannot release page-table row {row}: no request has it, of {self.max_requests} rows; nothing was "
                "released; release each row once"
            )
        pages = self.row_pages(row)
        self._table[row] = 0
        self._kv_lens[row] = 0
        self._taken[row] = 0
        self._releases[row] += 1
        self._in_use[row] = False
        self._free_rows.append(int(row))
        return pages

    def clear(self) -> None:
        """Takes every row back, whatever state the books are in; each counts as given back once more."""
        self._releases += 1
        for array in (self._table, self._kv_lens, self._taken, self._in_use):
            array[:] = 0
        self._free_rows = deque(range(self.max_requests))

    def append_pages(self, row: int, pages: npt.ArrayLike) -> None:
        """Adds full pages of cached tokens to the end of a row, as after a prefix hit.

        Args:
            row: a request's row, whose last page is full.
            pages: page ids, ``[n]``.

        Raises:
            ShapeError: not a row in use, its last page is partial, more tokens than ``max_context_tokens``, or not
                distinct pages other than the null page.
        """
        added, length = integer_vector("pages", pages), self.kv_len(row)
        held = length // self.page_size
        end = length + added.size * self.page_size
        if length % self.page_size:
            raise ShapeError(f"row {row} ends in a partial page at {length} tokens; full pages follow full pages only")
        if not added.size:
            return
        self._check_context(np.array([row]), np.array([end]))
        check_new_pages(added)
        if np.isin(added, self._table[row, :held]).any():
            raise ShapeError(f"pages {added.tolist()} are in row {row} already; a page stands in a row once")
        self._table[row, held : held + added.size] = added
        self._kv_lens[row] = end

    def write_slots(
        self, rows: npt.ArrayLike, starts: npt.ArrayLike, lens: npt.ArrayLike, slots: npt.ArrayLike
    ) -> None:
        """Grows rows by new tokens: appends the pages that begin among their slots.

        Args:
            rows: ``[B]`` distinct rows in use.
            starts: ``[B]`` position of the first new token: the row's length in tokens.
            lens: ``[B]`` new tokens.
            slots: ``[sum(lens)]`` their slots (``out_cache_loc``), one sequence after the other.

        Raises:
            ShapeError: shapes or rows are wrong, a start is not the row's length, a row would exceed
                ``max_context_tokens``, or a slot does not continue its row: another offset, another page in
                mid-page, the null page, or a page that begins twice.
        """
        index, first = self._checked_rows(rows), integer_vector("starts", starts)
        counts, new = integer_vector("lens", lens), integer_vector("slots", slots)
        equal_lengths(rows=index, starts=first, lens=counts)
        self._check_growth(index, first, counts, new)
        token_rows, positions = np.repeat(index, counts), ranges(first, counts)
        pages = new // self.page_size
        begins = positions % self.page_size == 0
        check_continues(self._table, self.page_size, token_rows, positions, new, pages, begins)
        check_new_pages(pages[begins])
        if (self._table[token_rows[begins]] == pages[begins][:, None]).any():
            raise ShapeError(
                f"one of the pages {pages[begins][:8].tolist()} is in its row already; a page stands there once"
            )
        self._table[token_rows[begins], positions[begins] // self.page_size] = pages[begins]
        self._kv_lens[index] = first + counts

    def plan_growth(self, rows: npt.ArrayLike, counts: npt.ArrayLike) -> RowGrowth:
        """Works out what it takes to grow rows by new tokens: they fill each last partial page, then fresh ones.

        Args:
            rows: ``[B]`` distinct rows in use.
            counts: ``[B]`` new tokens, 0 or more.

        Raises:
            ShapeError: shapes or rows are wrong, a count is negative, or a row would exceed ``max_context_tokens``.
        """
        index, new = self._checked_rows(rows), integer_vector("counts", counts)
        equal_lengths(rows=index, counts=new)
        if new.size and new.min() < 0:
            raise ShapeError(f"row {index[new.argmin()]} cannot grow by {new.min()} tokens; rows do not shrink")
        lens = self._kv_lens[index]
        ends = lens + new
        if ends.size and ends.max() > self.max_context_tokens:
            self._check_context(index, ends)
        held = self._pages_of(lens)
        return RowGrowth(index, lens, ends, held, self._pages_of(ends) - held)

    def grow(self, growth: RowGrowth, pages: Int32) -> None:
        """Grows rows as planned.

        Args:
            growth: from ``plan_growth``; the rows have not changed since.
            pages: the fresh pages, int32 ``[growth.num_pages]``, one sequence after the other.

        Raises:
            ShapeError: the rows have changed, or there are not just as many distinct pages, other than the null page,
                as were planned.
        """
        self.check_unchanged(growth)
        if pages.size != growth.num_pages:
            raise ShapeError(f"there are {pages.size} pages for {growth.num_pages} that the new tokens begin")
        if pages.size:
            check_new_pages(pages.astype(np.int64))
            self._table[np.repeat(growth.rows, growth.fresh), ranges(growth.held, growth.fresh)] = pages
        self._kv_lens[growth.rows] = growth.ends

    def check_unchanged(self, growth: RowGrowth) -> None:
        """Raises ShapeError where rows have changed since their growth was planned."""
        if (self._kv_lens[growth.rows] != growth.lens).any():
            raise ShapeError("rows have changed since their growth was planned; plan it again")

    def decoding_rows(self, rows: npt.ArrayLike) -> DecodingRows:
        """Takes distinct rows in use together, to grow by a token a step; raises ShapeError where they are not."""
        shared = self._table, self._kv_lens, self._taken, self._releases
        return DecodingRows(self._checked_rows(rows), *shared, self.page_size, self.max_context_tokens)

    def take_new_pages(self, rows: npt.ArrayLike) -> tuple[Int32, Int32]:
        """The pages of rows that no call has returned before, for the copy of the table on the device.

        Args:
            rows: ``[B]`` distinct rows in use.

        Returns:
            int32 ``[n]`` places, ``row * max_pages + column``, and the pages that stand there.

        Raises:
            ShapeError: not an integer vector of distinct rows in use.
        """
        index = self._checked_rows(rows)
        taken = self._taken[index]
        fresh = self._pages_of(self._kv_lens[index]) - taken
        if not fresh.any():
            return np.empty(0, np.int32), np.empty(0, np.int32)
        places = ranges(index * self.max_pages + taken, fresh)
        self._taken[index] += fresh
        return places.astype(np.int32), self._table.reshape(-1)[places]

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
        # Not through an array of one row: this is asked for each request that comes or goes.
        is_row = type(row) is int or isinstance(row, np.integer)
        if not is_row or not 0 <= row < self.max_requests or not self._in_use.item(row):
            raise ShapeError(f"row {row!r} of {self.max_requests} is not in use; get it from alloc_row first")
        return self._kv_lens.item(row)

    def row_pages(self, row: int) -> Int32:
        """The pages of one row in order; int32 ``[n]``, fresh.

        Raises:
            ShapeError: not a row in use.
        """
        return self._table[row, : -(-self.kv_len(row) // self.page_size)].copy()

    def full_pages(self, row: int, tokens: int) -> Int32:
        """Those pages of one row that its first ``tokens`` tokens, or all that it has, fill; int32 ``[n]``, fresh.

        Raises:
            ShapeError: not a row in use.
        """
        return self._table[row, : min(self.kv_len(row), tokens) // self.page_size].copy()

    def held_pages(self) -> Int32:
        """The pages of all rows, a shared page once per row; int32 ``[n]``, for the allocator's integrity check."""
        pages: Int32 = self._table[self._table != 0]
        return pages

    def slots(self, row: int, start: int, stop: int) -> Int32:
        """Slots of tokens ``start`` to ``stop - 1`` of a row; int32 ``[stop - start]``.

        Raises:
            ShapeError: not a row in use, or the row has no such tokens.
        """
        length = int(self._kv_lens[self._checked_rows([row])[0]])
        if not 0 <= start <= stop <= length:
            raise ShapeError(f"row {row} has no tokens {start} to {stop}; it has {length}, counted from 0")
        return self._slots_at(np.array([row]), np.arange(start, stop))

    def last_loc(self, rows: npt.ArrayLike, lens: npt.ArrayLike) -> Int32:
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

    def _slots_at(self, rows: Int64, positions: Int64) -> Int32:
        page, offset = np.divmod(positions, self.page_size)
        return (self._table[rows, page].astype(np.int64) * self.page_size + offset).astype(np.int32)

    def _checked_rows(self, rows: npt.ArrayLike, *, distinct: bool = True) -> Int64:
        index = integer_vector("rows", rows)
        if index.size and (index.min() < 0 or index.max() >= self.max_requests):
            raise ShapeError(f"rows go from {index.min()} to {index.max()}; the table has 0 to {self.max_requests - 1}")
        if not self._in_use[index].all():
            raise ShapeError(f"row {index[self._in_use[index].argmin()]} is not in use; get it from alloc_row first")
        if distinct and index.size > 1 and np.bincount(index).max() > 1:
            raise ShapeError(f"row {np.bincount(index).argmax()} is listed more than once; list each row once a call")
        return index

    def _check_growth(self, rows: Int64, starts: Int64, counts: Int64, slots: Int64) -> None:
        """Checks how much is written, and that it begins where each row ends."""
        right = (starts == self._kv_lens[rows]) & (counts >= 0)
        if not right.all():
            at = int(right.argmin())
            raise ShapeError(
                f"row {rows[at]}: cannot write {counts[at]} tokens from position {starts[at]}; it has "
                f"{self._kv_lens[rows[at]]} tokens and grows at its end only"
            )
        self._check_context(rows, starts + counts.clip(max=INT32_MAX))
        if slots.size != counts.sum():
            raise ShapeError(f"there are {slots.size} slots for {counts.sum()} new tokens; each needs one")

    def _check_context(self, rows: Int64, ends: Int64) -> None:
        if (ends > self.max_context_tokens).any():
            at = int((ends > self.max_context_tokens).argmax())
            raise ShapeError(
                f"row {rows[at]} cannot grow to {ends[at]} tokens: max_context_tokens is {self.max_context_tokens} "
                f"({self.max_pages} pages); stop the request or raise it"
            )
