"""The row table: the pages of each running request, and how far its row is granted, computed and known to the device.

A row has a list of pages for each group of layers. In a group with a window, pages that lie wholly behind the window
leave the row (``leave_behind``), and the null page stands in their place.

Rows of page ids, as the block tables of PagedAttention (arXiv 2309.06180); the name ``ReqToTokenPool`` is SGLang's,
whose table holds one slot per token: here it is one entry per page.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, DoubleFreeError, IntegrityError, KVPoolExhausted, ShapeError
from engine.layer_groups import first_kept_page
from engine.memory.integers import (
    INT32_MAX,
    Bool,
    Int32,
    Int64,
    equal_lengths,
    integer_vector,
    integers_by_group,
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
        places: int64 ``[n]`` where fresh pages go, ``(row * groups + group) * max_pages + column``: all of a group,
            one row after the other, then those of the next group.
        runs: int64 ``[groups * B]`` fresh pages of each row; None where no row begins more than one.
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
    """One row per running request, of page ids: int32 ``[max_requests, groups, max_pages]``, 0 where there is no page.

    A row grows and shrinks at its end only, in all groups alike: token ``p`` lies in page
    ``row[group, p // page_size]`` at offset ``p % page_size``. Besides its pages a row has, each in one column that
    only this table writes:

        granted      tokens that have a slot
        computed     tokens whose keys and values a step that has run has written; never more than granted
        known, most  tokens that its request knew when it was admitted, and can need at most
        told         pages whose ids have been sent to the device
        first        of each group, the pages behind the window, which it does not hold any more
        generation   how often the row was given back: tells a request's steps from those of the row's next request

    ``membership`` is a number that changes whenever a row is handed out or given back: while it stays, rows that were
    in use still are, for the same requests. The table has each row's pages; the page pool counts the holders of a page.
    Whatever is returned is a copy, because the CPU backend may alias a NumPy buffer that a running step still reads.

    Args:
        max_requests: rows.
        max_context_tokens: most tokens of one request.
        page_size: tokens per page.
        windows: of each group of layers, the tokens that a query sees, itself included; None is all before it.

    Raises:
        ConfigError: a value is not a positive integer, a page is larger than a window, or the machine cannot hold the
            table.
    """

    def __init__(
        self,
        max_requests: int,
        max_context_tokens: int,
        page_size: int,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        self.max_requests = positive_option("max_requests", max_requests)
        self.max_context_tokens = positive_option("max_context_tokens", max_context_tokens)
        self.page_size = positive_option("page_size", page_size)
        self.max_pages = -(-self.max_context_tokens // self.page_size)
        self.windows = _checked_windows(windows, self.page_size)
        self.num_groups = len(self.windows)
        self._windowed = [(group, window) for group, window in enumerate(self.windows) if window is not None]
        self._group_offsets = np.arange(self.num_groups, dtype=np.int64)[:, None] * self.max_pages
        self._row_places = self.num_groups * self.max_pages
        try:
            self._table = np.zeros((self.max_requests, self.num_groups, self.max_pages), np.int32)
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
        self._first = np.zeros((self.max_requests, self.num_groups), np.int64)
        self._in_use = np.zeros(self.max_requests, np.bool_)
        # Every column but the generation: empty in a row that no request has.
        self._columns: tuple[npt.NDArray[Any], ...] = (
            self._table, self._granted, self._computed, self._known, self._most, self._told, self._first, self._in_use,
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

    @property
    def has_windows(self) -> bool:
        """Whether any group has a window."""
        return bool(self._windowed)

    def rows(self, req_pool_indices: npt.ArrayLike, group: int = 0) -> Int32:
        """The page-table rows of a batch in one group; int32 ``[B, max_pages]``, a fresh copy each time.

        Raises:
            ShapeError: not an integer vector of rows in use, or there is no such group.
        """
        pages: Int32 = self._table[self._checked_rows(req_pool_indices, distinct=False), self._checked_group(group)]
        return pages

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

    def row_pages(self, row: int, group: int = 0) -> PageIds:
        """The pages of one row in one group in order, null pages behind the window; int32 ``[n]``, fresh.

        Raises:
            ShapeError: the row is not in use, or there is no such group.
        """
        return PageIds(self._table[row, self._checked_group(group), : self._count_of(row)].copy())

    def pages_by_group(self, row: int) -> Int32:
        """As ``row_pages``, of all groups; int32 ``[groups, n]``, fresh."""
        return self._table[row, :, : self._count_of(row)].copy()

    def full_pages(self, row: int, tokens: int) -> Int32:
        """Those pages of one row that its first ``tokens`` computed tokens fill; int32 ``[groups, n]``, fresh.

        Raises:
            ShapeError: not a row in use, or ``tokens`` is not an integer, 0 or more.
        """
        full = min(self.computed_len(row), whole_number("tokens", tokens)) // self.page_size
        return self._table[row, :, :full].copy()

    def window_pages_held(self, group: int) -> Int64:
        """Pages that each admitted request holds in a group; int64 ``[n]``, in the order of ``request_lens()``."""
        index = self._known.nonzero()[0]
        held: Int64 = self._pages_of(self._granted[index]).astype(np.int64) - self._first[index, group]
        return held

    def held_pages(self) -> PageIds:
        """The pages of all rows and groups, a shared page once per row; int32 ``[n]``, for the check of the pool."""
        return PageIds(self._table[self._table != 0])

    def rows_that_share(self, row: int, pages: Int32, first: int) -> list[tuple[int, int]]:
        """Other rows that hold page ``first`` of a row, each with how many of ``pages``, from the row's first on.

        All of it in the first group.
        """
        rows = (self._table[:, 0, first] == pages[first]).nonzero()[0]
        shared = np.logical_and.accumulate(self._table[rows, 0, : pages.size] == pages, axis=1).sum(axis=1)
        return [(other, count) for other, count in zip(rows.tolist(), shared.tolist(), strict=True) if other != row]

    def slots(self, row: int, start: int, stop: int, group: int = 0) -> Slots:
        """Slots of tokens ``start`` to ``stop - 1`` of a row in one group; int32 ``[stop - start]``.

        Raises:
            ShapeError: not a row in use, the row has no such tokens, or they lie in pages behind the window.
        """
        length = self.kv_len(row)
        if not (is_integer(start) and is_integer(stop) and 0 <= start <= stop <= length):
            raise ShapeError(f"row {row} has no tokens {start} to {stop}; it has {length}, counted from 0")
        left = self._first.item(row, self._checked_group(group)) * self.page_size
        if start < min(left, stop):
            raise ShapeError(f"row {row} has no token {start} in group {group}: its window has left {left} behind")
        return self._slots_at(np.array([row]), np.arange(start, stop), group)

    def last_loc(self, rows: npt.ArrayLike, lens: npt.ArrayLike) -> Slots:
        """Slot of token ``lens - 1`` of each row in the first group, -1 where ``lens`` is 0; int32 ``[B]``.

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
        slots = self._slots_at(index, np.maximum(counts - 1, 0), 0)
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
        row, listed = int(row), self.pages_by_group(row)
        pages = PageIds(listed[listed > 0])
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

    def append_pages(
        self, row: int, pages: npt.ArrayLike, *, computed: int | None = None, goes_on_at: int = 0
    ) -> PageIds:
        """Adds full pages to the end of a row, as after a prefix hit.

        Args:
            row: a request's row, whose last page is full.
            pages: page ids, ``[groups, n]``, or ``[n]`` of the only group. In a group with a window the first of them
                may be null pages: those that lie behind the window when the row goes on after them.
            computed: the tokens of so many of them count as computed, where all tokens before them do; None: of all.
            goes_on_at: position of the first token that will see them, where that is not the one after them.

        Returns:
            int32 ``[k]`` the pages of the row before null pages, which have left it, for the page pool to release.

        Raises:
            ShapeError: not a row in use, its last page is partial, more tokens than ``max_context_tokens``, not
                distinct pages, or a null page that the window of its group does not leave behind.
        """
        self.caller.enter()
        added, length = integers_by_group("pages", pages, self.num_groups), self.kv_len(row)
        held, new = length // self.page_size, added.shape[1]
        end = length + new * self.page_size
        if length % self.page_size:
            raise ShapeError(f"row {row} ends in a partial page at {length} tokens; full pages follow full pages only")
        if not new:
            return NO_PAGES
        self._check_context(np.array([row]), np.array([end]))
        first = self._first_with(row, added, held, max(end, goes_on_at))
        listed = added.reshape(-1) if first is None else added[added != 0]
        _check_new_pages(listed)
        if np.isin(listed, self._table[row, :, :held]).any():
            raise ShapeError(f"pages {added.tolist()} are in row {row} already; a page stands in a row once")
        left = [] if first is None else [self._table[row, g, : min(first[g], held)] for g, _ in self._windowed]
        dropped = np.concatenate([NO_PAGES, *left])
        with self._undoing(row):
            self._table[row, :, held : held + new] = added
            if first is not None:
                for group, _ in self._windowed:
                    self._table[row, group, : first[group]] = 0
                self._first[row] = first
            self._granted[row] = end
            if self._computed[row] == length:
                self._computed[row] = end if computed is None else length + computed * self.page_size
            return PageIds(dropped[dropped > 0])

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
                mid-page, the null page, or a page that begins twice; or there is more than one group.
        """
        self.caller.enter()
        if self.num_groups > 1:
            raise ShapeError(f"a slot has one page, and this table has {self.num_groups} groups of them; use grow")
        index, first = self._checked_rows(rows), integer_vector("starts", starts)
        counts, new = integer_vector("lens", lens), integer_vector("slots", slots)
        equal_lengths(rows=index, starts=first, lens=counts)
        self._check_written(index, first, counts, new)
        token_rows, positions = np.repeat(index, counts), ranges(first, counts)
        pages = new // self.page_size
        begins = positions % self.page_size == 0
        self._check_continues(token_rows, positions, new, pages, begins)
        _check_new_pages(pages[begins])
        if (self._table[token_rows[begins], 0] == pages[begins][:, None]).any():
            raise ShapeError(
                f"one of the pages {pages[begins][:8].tolist()} is in its row already; a page stands there once"
            )
        with self._undoing(index):
            self._table[token_rows[begins], 0, positions[begins] // self.page_size] = pages[begins]
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
            places = self._in_groups(index[begins] * self._row_places + lens[begins] // self.page_size)
            return RowGrowth(index, lens, ends, places, None, self._changes, self._mark_of(index))
        new = np.full(index.size, counts) if is_integer(counts) else integer_vector("counts", counts)
        equal_lengths(rows=index, counts=new)
        if new.size and new.min() < 0:
            raise ShapeError(f"row {index[new.argmin()]} cannot grow by {new.min()} tokens; use truncate to shrink")
        wide = lens + new.clip(max=INT32_MAX)  # what is far too much must not overflow into little
        self._check_context(index, wide)
        held = self._pages_of(lens)
        fresh = (self._pages_of(wide) - held).astype(np.int64)
        places = self._in_groups(np.repeat(index * self._row_places, fresh) + ranges(held, fresh))
        runs = np.tile(fresh, self.num_groups) if fresh.size and fresh.max() > 1 else None
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

    def check_truncation(self, row: int, tokens: int) -> int:
        """Reads to how many tokens a row is to shrink.

        Raises:
            ShapeError: not a row in use, it has fewer tokens, or a window has left pages behind that it would need.
        """
        length = self.kv_len(row)
        if whole_number("tokens", tokens) > length:
            raise ShapeError(f"cannot truncate row {row} to {tokens} tokens: it has {length}; use grow to lengthen it")
        for group, window in self._windowed if tokens else ():
            first = self._first.item(row, group)
            if first > first_kept_page(window, tokens, self.page_size):
                raise ShapeError(
                    f"cannot truncate row {row} to {tokens} tokens: in group {group} the pages of its first "
                    f"{first * self.page_size} tokens have left with the window of {window}, and the next token would "
                    f"see some of them; keep {first * self.page_size + window - 1} tokens or more, or release the row"
                )
        return int(tokens)

    def truncate(self, row: int, tokens: int, last_pages: Int32 | None = None) -> PageIds:
        """Shrinks a row to its first ``tokens`` tokens, as when speculation is rejected.

        Args:
            row: a row in use.
            tokens: number of tokens that it keeps.
            last_pages: int32 ``[groups]`` pages to put in place of the last ones that it keeps, 0 where that one stays;
                None: all of them stay.

        Returns:
            int32 ``[n]`` the pages that it no longer holds, for the page pool to release.

        Raises:
            ShapeError: as ``check_truncation``.
        """
        self.caller.enter()
        self.check_truncation(row, tokens)
        held, count = -(-tokens // self.page_size), self._count_of(row)
        new = np.zeros(self.num_groups, np.int32) if last_pages is None else last_pages
        replaced = new.nonzero()[0]
        gone = self._table[row, :, held:count]
        pages = PageIds(np.concatenate([self._table[row, replaced, held - 1], gone[gone > 0]]))
        with self._undoing(row):
            self._table[row, replaced, held - 1] = new[replaced]
            self._table[row, :, held:] = 0
            self._granted[row] = tokens
            self._computed[row] = min(self._computed.item(row), tokens)
            self._told[row] = min(self._told.item(row), held - (replaced.size > 0))
            if not tokens:
                self._first[row] = 0
            return pages

    def replace_pages(self, row: int, groups: Int64, columns: Int64, pages: PageIds) -> PageIds:
        """Puts other pages with the same contents in place of some of a row's; their ids are sent to the device again.

        Args:
            row: a row in use.
            groups: ``[n]`` their groups.
            columns: ``[n]`` their places among the row's pages.
            pages: ``[n]`` the pages that stand there from now on.

        Returns:
            int32 ``[n]`` the pages that stood there, for the page pool to release.
        """
        self.caller.enter()
        before = PageIds(self._table[row, groups, columns])
        with self._undoing(row):
            self._table[row, groups, columns] = pages
            self._told[row] = min(self._told.item(row), int(columns.min()))
            return before

    def leave_behind(self, rows: npt.ArrayLike) -> PageIds:
        """Takes out of rows the pages that lie wholly behind a window: no token after the computed ones sees them.

        Steps under way begin at the first token that is not computed, or later, so none of them reads such a page.

        Args:
            rows: ``[B]`` distinct rows in use.

        Returns:
            int32 ``[n]`` these pages, for the page pool to release.

        Raises:
            ShapeError: not an integer vector of distinct rows in use.
        """
        self.caller.enter()
        index = self._checked_rows(rows)
        computed, places, moved = self._computed[index].astype(np.int64), [], []
        for group, window in self._windowed:
            kept = np.maximum(computed - (window - 1), 0) // self.page_size
            first = self._first[index, group]
            further = (kept > first).nonzero()[0]
            if further.size:
                begin, count = first[further], kept[further] - first[further]
                base = np.repeat(index[further] * self._row_places + group * self.max_pages, count)
                places.append(base + ranges(begin, count))
                moved.append((index[further], group, begin, kept[further]))
        if not moved:
            return NO_PAGES
        table, every = self._table.reshape(-1), np.concatenate(places)
        pages = PageIds(table[every])
        try:
            table[every] = 0
            for those, group, _, kept in moved:
                self._first[those, group] = kept
            return pages
        except BaseException:
            table[every] = pages
            for those, group, begin, _ in moved:
                self._first[those, group] = begin
            raise

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
            int32 ``[n]`` places, ``(row * groups + group) * max_pages + column``, and the pages that stand there; not
            the null pages behind a window, which are never read.

        Raises:
            ShapeError: not an integer vector of distinct rows in use.
        """
        self.caller.enter()
        index = self._checked_rows(rows)
        mark = self._mark_of(index)
        if mark and self._added_at == (self._changes, mark):  # these rows have grown, and nothing else has changed
            places, pages = self._added
            changed, held = places // self._row_places, None
        else:
            told, held = self._told[index], self._pages_of(self._granted[index])
            grown = (held > told).nonzero()[0]
            first, fresh = index[grown] * self._row_places + told[grown], held[grown] - told[grown]
            places = self._in_groups(first if grown.size == fresh.sum() else ranges(first, fresh))
            changed, pages = index, PageIds(self._table.reshape(-1)[places])
            if self._windowed:
                places, pages = places[pages > 0], PageIds(pages[pages > 0])
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
        columns = np.arange(self.max_pages)
        expected = columns < -(-self._granted // self.page_size)[:, None, None]
        expected = expected & (columns >= self._first[:, :, None])
        wrong = ((self._table > 0) != expected).any(axis=(1, 2)) | (self._table < 0).any(axis=(1, 2))
        wrong |= ~self._in_use & ((self._granted > 0) | (self._known > 0) | (self._told > 0))
        for group, window in enumerate(self.windows):
            most = 0 if window is None else np.maximum(self._granted - window + 1, 0) // self.page_size
            wrong |= (self._first[:, group] > most) | (self._first[:, group] < 0)
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

    def _count_of(self, row: int) -> int:
        """Pages that one row has begun; raises ShapeError where it is not in use."""
        return -(-self.kv_len(row) // self.page_size)

    def _in_groups(self, places: Int64) -> Int64:
        """The places, given for the first group, in every group; ``[groups * n]``, one group after the other."""
        return places if self.num_groups == 1 else (self._group_offsets + places).reshape(-1)

    def _first_with(self, row: int, added: Int64, held: int, position: int) -> Int64 | None:
        """Of each group the first page that a row holds once pages are added after ``held``; None without windows.

        ``position`` is that of the first token that will see them.
        """
        if not self._windowed:
            return None
        first: Int64 = self._first[row].copy()
        given = added != 0
        for group, window in self._windowed:
            behind = int(given[group].argmax()) if given[group].any() else added.shape[1]
            if behind and held + behind <= first_kept_page(window, position, self.page_size):
                first[group] = held + behind
                given[group, :behind] = True
        if not given.all():
            raise ShapeError(f"a null page cannot follow in row {row}, unless its group's window has left it behind")
        return first

    def _checked_group(self, group: int) -> int:
        if not is_integer(group) or not 0 <= group < self.num_groups:
            raise ShapeError(f"there is no group {group!r}: the table has {self.num_groups}, counted from 0")
        return group

    def _slots_at(self, rows: Int64, positions: Int64, group: int) -> Slots:
        page, offset = np.divmod(positions, self.page_size)
        return Slots((self._table[rows, group, page].astype(np.int64) * self.page_size + offset).astype(np.int32))

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
        before[first] = self._table[rows[first], 0, np.maximum(positions[first] - 1, 0) // self.page_size]
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


def _checked_windows(windows: Sequence[int | None], page_size: int) -> tuple[int | None, ...]:
    if not windows:
        raise ConfigError("windows is empty; it has one entry for each group of layers, None for full attention")
    for window in windows:
        if window is not None and positive_option("a group's window", window) < page_size:
            raise ConfigError(
                f"page_size={page_size} tokens is larger than a window of {window}: a page could never be left behind; "
                f"lower page_size to {window} or less"
            )
    return tuple(windows)


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
