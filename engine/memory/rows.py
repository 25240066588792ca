"""The page table: which pages hold the tokens of each running request.

Rows of page ids, as the block tables of PagedAttention (arXiv 2309.06180); the name ``ReqToTokenPool`` is SGLang's,
whose table holds a slot a token: here it is one entry a page.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import DoubleFreeError, KVPoolExhausted, ShapeError
from engine.memory.decoding_rows import DecodingRows
from engine.memory.integers import (
    INT32_MAX,
    Int32,
    Int64,
    equal_lengths,
    integer_vector,
    ranges,
    whole_number,
)
from engine.memory.page_rows import PageRows
from engine.memory.pages import PageIds
from engine.memory.row_growth import RowGrowth, check_continues, check_new_pages


class ReqToTokenPool(PageRows):
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
        self.caller.enter()
        if whole_number("count", count) > len(self._free_rows):
            raise KVPoolExhausted(
                f"cannot allocate {count} page-table rows: {len(self._free_rows)} of {self.max_requests} are free; "
                "wait for a request to finish or raise max_requests",
                requested=count * self.max_context_tokens,
                available=len(self._free_rows) * self.max_context_tokens,
            )
        free = self._free_rows
        rows, available = np.array(list(islice(free, count)), np.int32), len(free)
        try:
            for _ in range(count):
                free.popleft()
            self._in_use[rows] = True
            return rows
        except BaseException:  # an interrupt too: the caller never learns of these rows
            free.extendleft(reversed(rows[: available - len(free)].tolist()))
            self._in_use[rows] = False
            raise

    def release(self, row: int) -> PageIds:
        """Takes a row back and clears it.

        Returns:
            int32 ``[n]`` the pages that it held, for the allocator to release.

        Raises:
            DoubleFreeError: no request has this row.
        """
        self.caller.enter()
        if not self.is_in_use(row):
            raise DoubleFreeError(
                f"cannot release page-table row {row}: no request has it, of {self.max_requests} rows; nothing was "
                "released; release each row once"
            )
        row, pages = int(row), self.row_pages(row)
        before = self._kv_lens[row], self._taken[row], self._releases[row]
        try:
            self._table[row, : pages.size] = 0
            self._kv_lens[row], self._taken[row], self._releases[row] = 0, 0, before[2] + 1
            self._in_use[row] = False
            self._free_rows.append(row)
            return pages
        except BaseException:
            self._table[row, : pages.size] = pages
            self._kv_lens[row], self._taken[row], self._releases[row] = before
            self._in_use[row] = True
            if row in self._free_rows:
                self._free_rows.remove(row)
            raise

    def clear(self) -> None:
        """Takes every row back, whatever state the books are in; each counts as given back once more."""
        self.caller.enter()
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
        self.caller.enter()
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
        try:
            self._table[row, held : held + added.size] = added
            self._kv_lens[row] = end
        except BaseException:
            self._shrink(np.array([row]), np.array([length], np.int32))
            raise

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
        self.caller.enter()
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
        try:
            self._table[token_rows[begins], positions[begins] // self.page_size] = pages[begins]
            self._kv_lens[index] = first + counts
        except BaseException:
            self._shrink(index, first)
            raise

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
        ends: Int64 = lens + new.clip(max=INT32_MAX)  # what is far too much must not overflow into little
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
        fresh = integer_vector("pages", pages)
        if fresh.size != growth.num_pages:
            raise ShapeError(f"there are {fresh.size} pages for {growth.num_pages} that the new tokens begin")
        check_new_pages(fresh)
        try:
            if fresh.size:
                self._table[np.repeat(growth.rows, growth.fresh), ranges(growth.held, growth.fresh)] = fresh
            self._kv_lens[growth.rows] = growth.ends
        except BaseException:
            self._shrink(growth.rows, growth.lens)
            raise

    def check_unchanged(self, growth: RowGrowth) -> None:
        """Raises ShapeError where rows have changed since their growth was planned."""
        self.caller.enter()
        if (self._kv_lens[growth.rows] != growth.lens).any():
            raise ShapeError("rows have changed since their growth was planned; plan it again")

    def decoding_rows(self, rows: npt.ArrayLike) -> DecodingRows:
        """Takes distinct rows in use together, to grow by a token a step; raises ShapeError where they are not."""
        shared = self._table, self._kv_lens, self._taken, self._releases
        return DecodingRows(self._checked_rows(rows), *shared, self.page_size, self.max_context_tokens)

    def rows_that_share(self, row: int, pages: Int32, first: int) -> list[tuple[int, int]]:
        """Other rows that hold page ``first`` of a row, each with how many of ``pages``, from the row's first on."""
        rows = (self._table[:, first] == pages[first]).nonzero()[0]
        shared = np.logical_and.accumulate(self._table[rows, : pages.size] == pages, axis=1).sum(axis=1)
        return [(other, count) for other, count in zip(rows.tolist(), shared.tolist(), strict=True) if other != row]

    def take_new_pages(self, rows: npt.ArrayLike) -> tuple[Int32, Int32]:
        """The pages of rows that no call has returned before, for the copy of the table on the device.

        Args:
            rows: ``[B]`` distinct rows in use.

        Returns:
            int32 ``[n]`` places, ``row * max_pages + column``, and the pages that stand there.

        Raises:
            ShapeError: not an integer vector of distinct rows in use.
        """
        self.caller.enter()
        index = self._checked_rows(rows)
        taken = self._taken[index]
        fresh = self._pages_of(self._kv_lens[index]) - taken
        if not fresh.any():
            return np.empty(0, np.int32), np.empty(0, np.int32)
        places = ranges(index * self.max_pages + taken, fresh)
        new = places.astype(np.int32), self._table.reshape(-1)[places]
        try:
            self._taken[index] = taken + fresh
            return new
        except BaseException:
            self._taken[index] = taken
            raise

    def _shrink(self, rows: Int64, lens: npt.NDArray[Any]) -> None:
        """Undoes a growth that raised half way."""
        self._kv_lens[rows] = lens
        self._table[rows] *= np.arange(self.max_pages) < self._pages_of(lens)[:, None]

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
