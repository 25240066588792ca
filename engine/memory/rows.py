"""The row table: the pages of each running request, and how far its row is granted, computed and known to the device.

Rows of page ids, as the block tables of PagedAttention (arXiv 2309.06180); the name ``ReqToTokenPool`` is SGLang's,
whose table holds one slot per token: here it is one entry per page.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, DoubleFreeError, IntegrityError, KVPoolExhausted, ShapeError
from engine.memory.integers import (
    INT32_MAX,
    Bool,
    Int32,
    Int64,
    equal_lengths,
    integer_vector,
    is_integer,
    positive_option,
    ranges,
    whole_number,
)
from engine.memory.one_caller import OneCaller
from engine.memory.pages import NO_PAGES, PageIds, Slots

NO_ROWS = np.empty(0, np.int64)
_ONE = np.int32(1)
_NO_PLACES = np.empty(0, np.int64)

Mark = tuple[int, np.dtype[Any], bytes]  # a membership, and rows as they were passed


class RequestLens(NamedTuple):
    """Tokens of requests, int64 ``[B]`` each, fresh arrays.

    Attributes:
        granted: tokens that have a slot.
        known: tokens that the request knew when it was admitted.
        most: tokens that it can need at most.
    """

    granted: Int64
    known: Int64
    most: Int64


class RowGrowth(NamedTuple):
    """What it takes to give rows more tokens, worked out before anything is taken.

    Attributes:
        rows: int64 ``[B]``.
        lens, ends: ``[B]`` granted tokens before and afterwards.
        places: int64 ``[n]`` where fresh pages go, ``row * max_pages + column``, one row after the other.
        runs: int64 ``[B]`` fresh pages of each row; None where no row begins more than one.
        change: the table's number of changes when this was worked out.
        mark: what tells these rows from others while none comes or goes; None where they came as a list.
    """

    rows: Int64
    lens: Int32
    ends: Int32
    places: Int64
    runs: Int64 | None
    change: int
    mark: Mark | None

    @property
    def num_pages(self) -> int:
        """Fresh pages in all."""
        return self.places.size


class ReqToTokenPool:
    """One row per running request, of page ids: int32 ``[max_requests, max_pages]``, 0 where there is no page.

    A row grows and shrinks at its end only: token ``p`` lies in page ``row[p // page_size]`` at offset
    ``p % page_size``. Besides its pages a row has, each in one column that only this table writes:

        granted      tokens that have a slot
        computed     tokens whose keys and values a step that has run has written; never more than granted
        known, most  tokens that its request knew when it was admitted, and can need at most
        told         pages whose ids have been sent to the device
        generation   how often the row was given back: tells a request's steps from those of the row's next request

    ``membership`` is a number that changes whenever a row is handed out or given back: while it stays, rows that were
    in use still are, for the same requests. The table has each row's pages; the page pool counts the holders of a page.
    Whatever is returned is a copy, because the CPU backend may alias a NumPy buffer that a running step still reads.

    Args:
        max_requests: rows.
        max_context_tokens: most tokens of one request.
        page_size: tokens per page.

    Raises:
        ConfigError: a value is not a positive integer, or the machine cannot hold the table.
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
        self.membership = 0
        self._granted = np.zeros(self.max_requests, np.int32)
        self._computed = np.zeros(self.max_requests, np.int32)
        self._known, self._most = np.zeros((2, self.max_requests), np.int64)
        self._told, self._generation = np.zeros((2, self.max_requests), np.int64)
        self._in_use = np.zeros(self.max_requests, np.bool_)
        # Every column but the generation: empty in a row that no request has.
        self._columns: tuple[npt.NDArray[Any], ...] = (
            self._table, self._granted, self._computed, self._known, self._most, self._told, self._in_use,
        )  # fmt: skip
        # First in, first out: a row that was just released is the last to be reused, so a stale index is seen.
        self._free_rows = deque(range(self.max_requests))
        self._changes = 0  # of any row's length or pages
        # The rows that were last found in use and distinct; at which membership, and what they were passed as.
        self._checked = NO_ROWS
        self._checked_at: Mark | None = None
        # At which change all pages of which rows were told; and at which a growth then added which pages, and where.
        self._told_at: tuple[int, Mark] | None = None
        self._added_at: tuple[int, Mark] | None = None
        self._added = _NO_PLACES, NO_PAGES
        self.caller = OneCaller()

    # What rows hold.

    @property
    def available_rows(self) -> int:
        """Rows that no request has."""
        return len(self._free_rows)

    def rows_in_use(self) -> Int32:
        """The rows that requests have, ascending; int32 ``[n]``, fresh."""
        return np.flatnonzero(self._in_use).astype(np.int32)

    def is_in_use(self, row: int) -> bool:
        """Whether ``row`` is one that a request has."""
        # Not through an array of one row: this is asked for each request that comes or goes.
        return is_integer(row) and 0 <= row < self.max_requests and self._in_use.item(row)

    def rows(self, req_pool_indices: npt.ArrayLike) -> Int32:
        """The page-table rows of a batch; int32 ``[B, max_pages]``, a fresh copy each time.

        Raises:
            ShapeError: not an integer vector of rows in use.
        """
        return self._table[self._checked_rows(req_pool_indices, distinct=False)]

    def kv_lens(self, req_pool_indices: npt.ArrayLike) -> Int32:
        """Granted tokens of each row; int32 ``[B]``, fresh. Raises ShapeError as ``rows``."""
        return self._granted[self._checked_rows(req_pool_indices, distinct=False)]

    def kv_len(self, row: int) -> int:
        """Granted tokens of one row; raises ShapeError where it is not in use."""
        return self._granted.item(self._checked_row(row))

    def computed_lens(self, req_pool_indices: npt.ArrayLike) -> Int32:
        """Computed tokens of each row; int32 ``[B]``, fresh. Raises ShapeError as ``rows``."""
        return self._computed[self._checked_rows(req_pool_indices, distinct=False)]

    def computed_len(self, row: int) -> int:
        """Computed tokens of one row; raises ShapeError where it is not in use."""
        return self._computed.item(self._checked_row(row))

    def request_lens(self, req_pool_indices: npt.ArrayLike | None = None) -> RequestLens:
        """The tokens of the requests of some rows.

        Args:
            req_pool_indices: ``[B]`` rows in use; None is every row of an admitted request.
        """
        index = self._known.nonzero()[0] if req_pool_indices is None else self._checked_rows(req_pool_indices)
        return RequestLens(self._granted[index].astype(np.int64), self._known[index], self._most[index])

    def generations(self, rows: Int32) -> Int64:
        """How often each row was given back; int64 ``[B]``, fresh. Rows need not be in use."""
        return self._generation[rows]

    def row_pages(self, row: int) -> PageIds:
        """The pages of one row in order; int32 ``[n]``, fresh. Raises ShapeError where it is not in use."""
        return PageIds(self._table[row, : -(-self.kv_len(row) // self.page_size)].copy())

    def full_pages(self, row: int, tokens: int) -> PageIds:
        """Those pages of one row that its first ``tokens`` computed tokens fill; int32 ``[n]``, fresh.

        Raises:
            ShapeError: not a row in use, or ``tokens`` is not an integer, 0 or more.
        """
        full = min(self.computed_len(row), whole_number("tokens", tokens)) // self.page_size
        return PageIds(self._table[row, :full].copy())

    def held_pages(self) -> PageIds:
        """The pages of all rows, a shared page once per row; int32 ``[n]``, for the integrity check of the pool."""
        return PageIds(self._table[self._table != 0])

    def rows_that_share(self, row: int, pages: Int32, first: int) -> list[tuple[int, int]]:
        """Other rows that hold page ``first`` of a row, each with how many of ``pages``, from the row's first on."""
        rows = (self._table[:, first] == pages[first]).nonzero()[0]
        shared = np.logical_and.accumulate(self._table[rows, : pages.size] == pages, axis=1).sum(axis=1)
        return [(other, count) for other, count in zip(rows.tolist(), shared.tolist(), strict=True) if other != row]

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
        right = (counts >= 0) & (counts <= self._granted[index])
        if not right.all():
            at = int(right.argmin())
            raise ShapeError(f"row {index[at]} has no token {counts[at] - 1}; it has {self._granted[index[at]]} tokens")
        slots = self._slots_at(index, np.maximum(counts - 1, 0))
        slots[counts == 0] = -1
        return slots

    # How rows come and go.

    def alloc_row(self, *, known: int = 0, most: int = 0) -> int:
        """Gives a request an empty row, with the tokens that it knows and can need at most; see ``alloc_rows``."""
        return int(self._alloc(1, known, most)[0])

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
        return self._alloc(whole_number("count", count), 0, 0)

    def release(self, row: int) -> PageIds:
        """Takes a row back and clears it.

        Returns:
            int32 ``[n]`` the pages that it held, for the page pool to release.

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
        with self._undoing(row):
            self.membership += 1
            self._generation[row] += 1
            for column in self._columns:
                column[row] = 0
            self._free_rows.append(row)
            return pages

    def clear(self) -> None:
        """Takes every row back, in any state of the table; each counts as given back once more."""
        self.caller.enter()
        self.membership += 1
        self._changes += 1
        self._generation += 1
        for column in self._columns:
            column[:] = 0
        self._free_rows = deque(range(self.max_requests))

    # How rows grow and shrink.

    def append_pages(self, row: int, pages: npt.ArrayLike) -> None:
        """Adds full pages of computed tokens to the end of a row, as after a prefix hit.

        Their tokens count as computed where all tokens before them do.

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
        _check_new_pages(added)
        if np.isin(added, self._table[row, :held]).any():
            raise ShapeError(f"pages {added.tolist()} are in row {row} already; a page stands in a row once")
        with self._undoing(row):
            self._table[row, held : held + added.size] = added
            self._granted[row] = end
            if self._computed[row] == length:
                self._computed[row] = end

    def write_slots(
        self, rows: npt.ArrayLike, starts: npt.ArrayLike, lens: npt.ArrayLike, slots: npt.ArrayLike
    ) -> None:
        """Grows rows by new tokens whose slots a slot allocator has handed out: appends the pages that begin there.

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
        self._check_written(index, first, counts, new)
        token_rows, positions = np.repeat(index, counts), ranges(first, counts)
        pages = new // self.page_size
        begins = positions % self.page_size == 0
        self._check_continues(token_rows, positions, new, pages, begins)
        _check_new_pages(pages[begins])
        if (self._table[token_rows[begins]] == pages[begins][:, None]).any():
            raise ShapeError(
                f"one of the pages {pages[begins][:8].tolist()} is in its row already; a page stands there once"
            )
        with self._undoing(index):
            self._table[token_rows[begins], positions[begins] // self.page_size] = pages[begins]
            self._granted[index] = first + counts

    def plan_growth(self, rows: npt.ArrayLike, counts: npt.ArrayLike) -> RowGrowth:
        """Works out what it takes to grow rows by new tokens: they fill each last partial page, then fresh ones.

        Args:
            rows: ``[B]`` distinct rows in use.
            counts: ``[B]`` new tokens, 0 or more; or one number for every row.

        Raises:
            ShapeError: shapes or rows are wrong, a count is negative, or a row would exceed ``max_context_tokens``.
        """
        index = self._checked_rows(rows)
        lens = self._granted[index]
        if type(counts) is int and counts == 1:  # a step of decoding
            if lens.size and lens.max() >= self.max_context_tokens:
                self._check_context(index, lens + np.int64(1))
            ends: Int32 = lens + _ONE
            begins = (lens % self.page_size == 0).nonzero()[0]
            places = index[begins] * self.max_pages + lens[begins] // self.page_size
            return RowGrowth(index, lens, ends, places, None, self._changes, self._mark_of(index))
        new = np.full(index.size, counts) if is_integer(counts) else integer_vector("counts", counts)
        equal_lengths(rows=index, counts=new)
        if new.size and new.min() < 0:
            raise ShapeError(f"row {index[new.argmin()]} cannot grow by {new.min()} tokens; use truncate to shrink")
        wide = lens + new.clip(max=INT32_MAX)  # what is far too much must not overflow into little
        self._check_context(index, wide)
        held = self._pages_of(lens)
        fresh = (self._pages_of(wide) - held).astype(np.int64)
        places = np.repeat(index * self.max_pages, fresh) + ranges(held, fresh)
        runs = fresh if fresh.size and fresh.max() > 1 else None
        return RowGrowth(index, lens, wide.astype(np.int32), places, runs, self._changes, self._mark_of(index))

    def grow(self, growth: RowGrowth, pages: PageIds) -> None:
        """Grows rows as planned.

        Args:
            growth: result of ``plan_growth``; no row has changed since.
            pages: the fresh pages, int32 ``[growth.num_pages]``, one sequence after the other.

        Raises:
            ShapeError: rows have changed, or there are not as many distinct pages, other than the null page, as were
                planned.
        """
        self.caller.enter()
        if growth.change != self._changes:
            raise ShapeError("rows have changed since their growth was planned; plan it again")
        if len(pages) != growth.places.size:
            raise ShapeError(f"there are {len(pages)} pages for {growth.places.size} that the new tokens begin")
        _check_new_pages(pages)
        try:
            self._changes += 1
            if growth.places.size:
                self._table.reshape(-1)[growth.places] = pages
            self._granted[growth.rows] = growth.ends
            if growth.runs is None and growth.mark and self._told_at == (growth.change, growth.mark):
                self._added_at, self._added = (self._changes, growth.mark), (growth.places, PageIds(pages.copy()))
        except BaseException:
            self._table.reshape(-1)[growth.places] = 0
            self._granted[growth.rows] = growth.lens
            raise

    def truncate(self, row: int, tokens: int, last_page: PageIds = NO_PAGES) -> PageIds:
        """Shrinks a row to its first ``tokens`` tokens, as when speculation is rejected.

        Args:
            row: a row in use.
            tokens: number of tokens that it keeps.
            last_page: int32 ``[1]`` page to put in place of the last one that it keeps; empty: that one stays.

        Returns:
            int32 ``[n]`` the pages that it no longer holds, for the page pool to release.

        Raises:
            ShapeError: not a row in use, or it has fewer tokens.
        """
        self.caller.enter()
        length = self.kv_len(row)
        if whole_number("tokens", tokens) > length:
            raise ShapeError(f"cannot truncate row {row} to {tokens} tokens: it has {length}; use grow to lengthen it")
        held = -(-tokens // self.page_size)
        kept = held - last_page.size
        pages = PageIds(self.row_pages(row)[kept:])
        with self._undoing(row):
            self._table[row, kept:held], self._table[row, held:] = last_page, 0
            self._granted[row] = tokens
            self._computed[row] = min(self._computed.item(row), tokens)
            self._told[row] = min(self._told.item(row), kept)
            return pages

    def replace_pages(self, row: int, columns: Int64, pages: PageIds) -> PageIds:
        """Puts other pages with the same contents in place of some of a row's; their ids are sent to the device again.

        Args:
            row: a row in use.
            columns: ``[n]`` ascending places within the row's pages.
            pages: ``[n]`` the pages that stand there from now on.

        Returns:
            int32 ``[n]`` the pages that stood there, for the page pool to release.
        """
        self.caller.enter()
        before = PageIds(self._table[row, columns])
        with self._undoing(row):
            self._table[row, columns] = pages
            self._told[row] = min(self._told.item(row), int(columns[0]))
            return before

    def mark_computed(self, rows: npt.ArrayLike, tokens: npt.ArrayLike) -> None:
        """Notes that the first ``tokens[i]`` tokens of ``rows[i]`` have been computed.

        Args:
            rows: ``[B]`` distinct rows in use.
            tokens: ``[B]`` tokens from the start of the sequence.

        Raises:
            ShapeError: not rows in use, or a row has been granted fewer tokens.
        """
        self.caller.enter()
        index = self._checked_rows(rows)
        ends = tokens if _is_vector(tokens) else integer_vector("tokens", tokens)
        if ends.size != index.size:
            equal_lengths(rows=index, tokens=ends)
        granted = self._granted[index]
        if (wrong := (ends > granted) | (ends < 0)).any():
            at = int(wrong.argmax())
            raise ShapeError(f"row {index[at]} cannot have computed {ends[at]} tokens: it was granted {granted[at]}")
        self._computed[index] = ends

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
        mark = self._mark_of(index)
        if mark and self._added_at == (self._changes, mark):  # these rows have grown, and nothing else has changed
            places, pages = self._added
            changed, held = places // self.max_pages, None
        else:
            told, held = self._told[index], self._pages_of(self._granted[index])
            grown = (held > told).nonzero()[0]
            first, fresh = index[grown] * self.max_pages + told[grown], held[grown] - told[grown]
            places = first if grown.size == fresh.sum() else ranges(first, fresh)
            changed, pages = index, PageIds(self._table.reshape(-1)[places])
        before, told_at, added_at = self._told[changed], self._told_at, self._added_at
        try:
            self._told_at, self._added_at = (self._changes, mark) if mark else None, None
            self._told[changed] = before + 1 if held is None else held
            return places.astype(np.int32), pages
        except BaseException:
            self._told[changed], self._told_at, self._added_at = before, told_at, added_at
            raise

    def check_integrity(self) -> None:
        """Proves that each row holds just the pages of its tokens and that a free row is empty.

        Raises:
            IntegrityError: names the first wrong row.
        """
        expected = np.arange(self.max_pages) < -(-self._granted // self.page_size)[:, None]
        wrong = ((self._table > 0) != expected).any(axis=1) | (self._table < 0).any(axis=1)
        wrong |= ~self._in_use & ((self._granted > 0) | (self._known > 0) | (self._told > 0))
        wrong |= (self._computed > self._granted) | (self._computed < 0) | (self._told > self._pages_of(self._granted))
        free = np.bincount(np.array(self._free_rows, np.int64), minlength=self.max_requests)
        wrong |= free + self._in_use != 1
        if wrong.any():
            row = int(wrong.argmax())
            raise IntegrityError(
                f"page-table row {row} has {np.count_nonzero(self._table[row])} pages, {self._granted[row]} granted, "
                f"{self._computed[row]} computed tokens and {self._told[row]} pages told, is "
                f"{'' if self._in_use[row] else 'not '}in use and {free[row]} times free; this is a bug, report it"
            )

    def _alloc(self, count: int, known: int, most: int) -> Int32:
        self.caller.enter()
        if count > len(self._free_rows):
            raise KVPoolExhausted(
                f"cannot allocate {count} page-table rows: {len(self._free_rows)} of {self.max_requests} are free; "
                "wait for a request to finish or raise max_requests",
                requested=count * self.max_context_tokens,
                available=len(self._free_rows) * self.max_context_tokens,
            )
        rows = np.array(list(islice(self._free_rows, count)), np.int32)
        with self._undoing(rows):
            self.membership += 1
            self._known[rows], self._most[rows], self._in_use[rows] = known, most, True
            for _ in range(count):
                self._free_rows.popleft()
            return rows

    @contextmanager
    def _undoing(self, rows: int | Int32 | Int64) -> Iterator[None]:
        """Puts rows back as they were where the body raises, an interrupt too."""
        columns = *self._columns, self._generation
        before, free = [column[rows].copy() for column in columns], self._free_rows.copy()
        try:
            self._changes += 1
            yield
        except BaseException:
            for column, values in zip(columns, before, strict=True):
                column[rows] = values
            self._free_rows = free
            self.membership += 1
            raise

    def _pages_of(self, lens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Pages that hold ``lens`` tokens."""
        return -(-lens // self.page_size)

    def _slots_at(self, rows: Int64, positions: Int64) -> Slots:
        page, offset = np.divmod(positions, self.page_size)
        return Slots((self._table[rows, page].astype(np.int64) * self.page_size + offset).astype(np.int32))

    def _checked_row(self, row: int) -> int:
        if not self.is_in_use(row):
            raise ShapeError(f"row {row!r} of {self.max_requests} is not in use; get it from alloc_row first")
        return row

    def _checked_rows(self, rows: npt.ArrayLike, *, distinct: bool = True) -> Int64:
        """Rows as int64, in use and, if wanted, each once; those of the last check are not looked at again."""
        mark = (self.membership, rows.dtype, rows.tobytes()) if _is_vector(rows) else None
        if mark is not None and mark == self._checked_at:
            return self._checked
        index = integer_vector("rows", rows)
        if index.size and (index.min() < 0 or index.max() >= self.max_requests):
            raise ShapeError(f"rows go from {index.min()} to {index.max()}; the table has 0 to {self.max_requests - 1}")
        if not self._in_use[index].all():
            raise ShapeError(f"row {index[self._in_use[index].argmin()]} is not in use; get it from alloc_row first")
        if not distinct:
            return index
        if index.size > 1 and np.bincount(index).max() > 1:
            raise ShapeError(f"row {np.bincount(index).argmax()} is listed more than once; list each row once per call")
        if mark is not None:
            index.flags.writeable = False
            self._checked_at = None  # no fault between the two leaves the rows of one with the mark of another
            self._checked = index
            self._checked_at = mark
        return index

    def _mark_of(self, index: Int64) -> Mark | None:
        """What tells checked rows from others, where they are those of the last check."""
        return self._checked_at if index is self._checked else None

    def _check_written(self, rows: Int64, starts: Int64, counts: Int64, slots: Int64) -> None:
        """Checks how much is written, and that it begins where each row ends."""
        right = (starts == self._granted[rows]) & (counts >= 0)
        if not right.all():
            at = int(right.argmin())
            raise ShapeError(
                f"row {rows[at]}: cannot write {counts[at]} tokens from position {starts[at]}; it has "
                f"{self._granted[rows[at]]} tokens and grows at its end only"
            )
        self._check_context(rows, starts + counts.clip(max=INT32_MAX))
        if slots.size != counts.sum():
            raise ShapeError(f"there are {slots.size} slots for {counts.sum()} new tokens; each needs one")

    def _check_continues(self, rows: Int64, positions: Int64, slots: Int64, pages: Int64, begins: Bool) -> None:
        """Checks that each slot has its position's offset and, in mid-page, the page of the token before."""
        before = np.concatenate([pages[:1], pages[:-1]])
        first = np.diff(rows, prepend=-1) != 0
        before[first] = self._table[rows[first], np.maximum(positions[first] - 1, 0) // self.page_size]
        right = (begins | (pages == before)) & (slots - pages * self.page_size == positions % self.page_size)
        if not right.all():
            at = int(right.argmin())
            raise ShapeError(
                f"slot {slots[at]} cannot hold token {positions[at]} of row {rows[at]} at page_size {self.page_size}; "
                "it must have that token's offset and, in mid-page, the page of the token before"
            )

    def _check_context(self, rows: Int64, ends: Int64) -> None:
        if (ends > self.max_context_tokens).any():
            at = int((ends > self.max_context_tokens).argmax())
            raise ShapeError(
                f"row {rows[at]} cannot grow to {ends[at]} tokens: max_context_tokens is {self.max_context_tokens} "
                f"({self.max_pages} pages); stop the request or raise it"
            )


def _check_new_pages(pages: npt.NDArray[Any]) -> None:
    """Checks that pages which enter the table are distinct int32 page ids, none of them the null page."""
    listed = pages.tolist()  # few: a step of decoding begins one or two
    if not listed:
        return
    if min(listed) < 1 or max(listed) > INT32_MAX:
        raise ShapeError(f"pages go from {min(listed)} to {max(listed)}; page ids are int32 and the null page is 0")
    if len(set(listed)) != len(listed):
        raise ShapeError("a new page begins twice in one call; each belongs to one place of one row")


def _is_vector(values: object) -> TypeGuard[npt.NDArray[Any]]:
    """Whether values are an array of signed integers with one axis, which needs no conversion."""
    return isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind == "i"
