"""The slot allocator of the paged pool.

The split into ``alloc``, ``alloc_extend`` and ``alloc_decode`` is that of SGLang's paged allocator, with which the
signatures are compatible; reference counts on pages follow PagedAttention (arXiv 2309.06180).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, KVPoolExhausted, ShapeError
from engine.memory.integers import (
    INT32_MAX,
    Bool,
    Int32,
    Int64,
    equal_lengths,
    integer_vector,
    positive_option,
    whole_number,
)
from engine.memory.one_caller import OneCaller
from engine.memory.pages.handouts import Handouts
from engine.memory.pages.page_pool import LedgerState, PageLedger


@dataclass(frozen=True, eq=False)
class AllocatorState:
    """A snapshot of an allocator. Immutable."""

    size: int
    page_size: int
    ledger: LedgerState
    void: frozenset[int]


class PagedTokenToKVPoolAllocator:
    """Hands out the slots of a paged pool.

    Pages are 1 to ``size / page_size``; page 0 is the null page, which nobody owns. A slot is
    ``page * page_size + offset``. Every page has a reference count: 0 is free, allocation makes it 1, ``retain`` and
    ``release`` change it, ``free`` releases the pages that slots lie in. Every call checks everything before it
    changes anything: a refused call changes nothing.

    What a free refuses: a page with no holder (double free), page 0, a slot outside of the pool. A stale free, of a
    page that was freed and has been handed out again since, is refused when it comes as an array that this allocator
    returned, or a view of one (see ``handouts``). A copied or concatenated array carries no such memory: then only
    the reference count speaks, and the holder's own books must (``ReqToTokenPool.release`` gives a row's pages once).

    Fresh pages of one sequence are consecutive where the free set has such a run (see ``free_pages``).

    Args:
        size: usable token slots, a multiple of ``page_size``.
        page_size: tokens a page.

    Raises:
        ConfigError: a size is not a positive integer, not whole pages, or beyond int32 slots.
    """

    def __init__(self, size: int, page_size: int) -> None:
        self.size = positive_option("size", size)
        self.page_size = positive_option("page_size", page_size)
        if self.size % self.page_size or self.size + self.page_size > INT32_MAX:
            raise ConfigError(
                f"size is {size} tokens with pages of {page_size}; it must be a multiple of page_size, and "
                f"size + page_size at most {INT32_MAX}; round it to whole pages"
            )
        self.num_pages = self.size // self.page_size
        self._ledger = PageLedger(self.num_pages)
        self._handouts = Handouts()
        self.caller = OneCaller()

    def available_size(self) -> int:
        """Free tokens."""
        return self._ledger.available * self.page_size

    def available_pages(self) -> int:
        """Free pages."""
        return self._ledger.available

    @property
    def ledger(self) -> PageLedger:
        """The counts themselves, for who has entered a call of ``caller`` already."""
        return self._ledger

    @property
    def clock(self) -> int:
        """Counts the takings of pages; see ``give_back_since``."""
        return self._ledger.clock

    def free_pages(self) -> Int32:
        """The free pages in no promised order; int32 ``[available_pages()]``, fresh."""
        return self._ledger.free_pages()

    def alloc(self, need_size: int) -> Int32:
        """Allocates whole pages.

        Args:
            need_size: tokens, a multiple of ``page_size``.

        Returns:
            int32 ``[need_size]`` slots, in order within each page.

        Raises:
            ShapeError: ``need_size`` is negative, not an integer or not whole pages.
            KVPoolExhausted: fewer tokens are free.
        """
        count, rest = divmod(whole_number("need_size", need_size), self.page_size)
        if rest:
            raise ShapeError(
                f"need_size is {need_size} tokens; it must be a multiple of page_size {self.page_size}; round it up "
                "or use alloc_extend"
            )
        self._check_available([count])
        clock = self._ledger.clock
        try:
            return self._handed_out(self._slots_of(self._ledger.take_runs(np.array([count], np.int64))))
        except BaseException:  # an interrupt too: the caller never learns of these pages
            self._ledger.give_back_since(clock)
            raise

    def alloc_extend(self, prefix_lens: npt.ArrayLike, seq_lens: npt.ArrayLike, last_loc: npt.ArrayLike) -> Int32:
        """Allocates the slots of tokens ``prefix_lens`` to ``seq_lens - 1`` of each sequence.

        A sequence's last partial page is filled first.

        Args:
            prefix_lens: ``[B]`` tokens that have slots already.
            seq_lens: ``[B]`` tokens afterwards.
            last_loc: ``[B]`` slot of token ``prefix_lens - 1``; -1 where ``prefix_lens`` is 0.

        Returns:
            int32 ``[sum(seq_lens - prefix_lens)]`` slots, one sequence after the other.

        Raises:
            ShapeError: not equally long integer vectors; ``seq_lens`` below ``prefix_lens``; or a ``last_loc`` that
                cannot be the last slot of such a sequence: not held, at another offset, or in a page to be appended
                to that has another holder or that another sequence of the batch appends to.
            KVPoolExhausted: fewer pages are free.
        """
        prefix, ends = integer_vector("prefix_lens", prefix_lens), integer_vector("seq_lens", seq_lens)
        last = integer_vector("last_loc", last_loc)
        equal_lengths(prefix_lens=prefix, seq_lens=ends, last_loc=last)
        if prefix.size and prefix.min() < 0:
            raise ShapeError(f"sequence {prefix.argmin()}: prefix_lens is {prefix.min()}; a length is 0 or more")
        if (ends < prefix).any():
            at = int((ends < prefix).argmax())
            raise ShapeError(f"sequence {at}: seq_lens {ends[at]} is below prefix_lens {prefix[at]}; both count tokens")
        pages, holders = self._check_last(prefix, last)
        offsets = prefix % self.page_size
        appends = (offsets > 0) & (ends > prefix)
        self._check_appenders(pages[appends], holders[appends])
        fresh_counts = -(-ends // self.page_size) - -(-prefix // self.page_size)
        self._check_available(fresh_counts.tolist())
        clock = self._ledger.clock
        try:
            fresh = self._ledger.take_runs(fresh_counts)
            slots = self._slots_of(_join_tails(pages[appends], appends, fresh, fresh_counts))
            if slots.size > (ends - prefix).sum():
                page_counts = fresh_counts + appends
                starts = (page_counts.cumsum() - page_counts) * self.page_size + offsets * appends
                slots = _cut_out(slots, starts, starts + ends - prefix)
            return self._handed_out(slots)
        except BaseException:
            self._ledger.give_back_since(clock)
            raise

    def alloc_decode(self, seq_lens: npt.ArrayLike, last_loc: npt.ArrayLike) -> Int32:
        """Allocates the slot of one new token per sequence; a page only where the token begins one.

        Args:
            seq_lens: ``[B]`` tokens, the new one counted.
            last_loc: ``[B]`` slot of token ``seq_lens - 2``; -1 where the new token is the first.

        Returns:
            int32 ``[B]`` slots.

        Raises:
            ShapeError: as for ``alloc_extend``; ``seq_lens`` below 1.
            KVPoolExhausted: fewer pages are free.
        """
        ends, last = integer_vector("seq_lens", seq_lens), integer_vector("last_loc", last_loc)
        equal_lengths(seq_lens=ends, last_loc=last)
        if ends.size and ends.min() < 1:
            at = int(ends.argmin())
            raise ShapeError(f"sequence {at}: seq_lens is {ends[at]}; it counts the new token, so it is at least 1")
        pages, holders = self._check_last(ends - 1, last)
        appends = ends % self.page_size != 1 % self.page_size
        self._check_appenders(pages[appends], holders[appends])
        slots = (last + 1).astype(np.int32)
        count = ends.size - int(np.count_nonzero(appends))
        if not count:
            return self._handed_out(slots)
        self._check_available([count])
        clock = self._ledger.clock
        try:
            slots[~appends] = self._ledger.take_singles(count) * np.int32(self.page_size)
            return self._handed_out(slots)
        except BaseException:
            self._ledger.give_back_since(clock)
            raise

    def alloc_pages(self, counts: npt.ArrayLike) -> Int32:
        """Allocates whole pages by their ids, for who keeps a page table; release them by ``release``.

        Args:
            counts: ``[B]`` pages of each sequence, 0 or more.

        Returns:
            int32 ``[sum(counts)]`` page ids, one sequence after the other.

        Raises:
            ShapeError: not a vector of integers, or one is negative.
            KVPoolExhausted: fewer pages are free.
        """
        wanted = integer_vector("counts", counts)
        if wanted.size and wanted.min() < 0:
            raise ShapeError(f"sequence {wanted.argmin()}: count is {wanted.min()} pages; it must be 0 or more")
        wanted = wanted[wanted > 0]  # in a step of decoding few sequences begin a page
        self._check_available(wanted.tolist())
        clock = self._ledger.clock
        try:
            return self._ledger.take_runs(wanted)
        except BaseException:
            self._ledger.give_back_since(clock)
            raise

    def alloc_single_pages(self, count: int) -> Int32:
        """Allocates pages that need not be neighbours, from the shortest runs, by their ids; see ``alloc_pages``.

        Args:
            count: pages, 0 or more.

        Returns:
            int32 ``[count]`` page ids.

        Raises:
            ShapeError: ``count`` is negative or not an integer.
            KVPoolExhausted: fewer pages are free.
        """
        self._check_available([whole_number("count", count)])
        clock = self._ledger.clock
        try:
            return self._ledger.take_singles(count)
        except BaseException:
            self._ledger.give_back_since(clock)
            raise

    def give_back_since(self, clock: int) -> None:
        """Frees what was handed out after ``clock`` stood there, for who raises before it has noted the pages.

        Nobody may have retained or released them since.
        """
        self._ledger.give_back_since(clock)

    def free(self, slots: npt.ArrayLike) -> None:
        """Releases, once each, the pages that ``slots`` lie in.

        Args:
            slots: any integer vector of slots; one slot of a page stands for the page.

        Raises:
            ShapeError: not an integer vector.
            DoubleFreeError: a page has no holder, is the null page or is outside of the pool; or ``slots`` is an
                array that was returned before one of its pages was handed out anew.
        """
        wanted = integer_vector("slots", slots)
        self.caller.enter()
        if wanted.size:
            self._ledger.release_once(wanted // self.page_size, known_since=self._handouts.time_of(slots))

    def retain(self, pages: npt.ArrayLike, *, are_distinct: bool = False) -> None:
        """Adds a holder to each page, see ``PageLedger.retain``."""
        self.caller.enter()
        self._ledger.retain(pages, are_distinct=are_distinct)

    def release(self, pages: npt.ArrayLike) -> None:
        """Takes a holder from each page, see ``PageLedger.release``."""
        self.caller.enter()
        self._ledger.release(pages)

    def ref_count(self, pages: npt.ArrayLike) -> Int32:
        """Holders of each page, see ``PageLedger.ref_count``."""
        return self._ledger.ref_count(pages)

    def clear(self) -> None:
        """Frees every page, whoever holds it; a later free through an array from before is refused."""
        self.caller.enter()
        self._ledger.clear()

    def backup_state(self) -> AllocatorState:
        """A snapshot: what is free, in which order, and how many holders each page has."""
        return AllocatorState(self.size, self.page_size, self._ledger.snapshot(), self._handouts.void_serials())

    def restore_state(self, state: AllocatorState) -> None:
        """Returns to a snapshot, whole: exactly the free pages and the counts of that moment.

        Pages allocated since are free again, and arrays returned since are void: a free through them is refused.
        Pages freed since are held again. A state may be restored any number of times.

        Raises:
            ConfigError: not a state, or one of an allocator of other size or page size.
        """
        if not isinstance(state, AllocatorState):
            raise ConfigError(f"cannot restore a {type(state).__name__}; pass what backup_state returned")
        if (state.size, state.page_size) != (self.size, self.page_size):
            raise ConfigError(
                f"cannot restore a state of {state.size} tokens in pages of {state.page_size} into a pool of "
                f"{self.size} in pages of {self.page_size}; both must be equal"
            )
        self.caller.enter()
        before = self.backup_state()
        try:
            self._ledger.restore(state.ledger)
            self._handouts.rewind(state.ledger.clock, state.void)
        except BaseException:
            self._ledger.restore(before.ledger)
            self._handouts.rewind(before.ledger.clock, before.void)
            raise

    def check_integrity(self, holders: npt.ArrayLike | None = None) -> None:
        """Proves that free and held pages make up the pool, see ``PageLedger.check_integrity``."""
        self._ledger.check_integrity(holders)

    def _slots_of(self, pages: Int32) -> Int32:
        """All slots of ``pages``, int32 ``[n * page_size]``, an array that owns its memory."""
        # Filled through a view of two axes: a view is what ``handouts`` would forget, and a copy takes time.
        slots = np.empty(pages.size * self.page_size, np.int32)
        first = (pages * np.int32(self.page_size))[:, None]
        np.add(first, np.arange(self.page_size, dtype=np.int32), out=slots.reshape(pages.size, self.page_size))
        return slots

    def _handed_out(self, slots: Int32) -> Int32:
        self._handouts.record(slots, self._ledger.clock)
        return slots

    def _check_available(self, page_counts: list[int]) -> None:
        self.caller.enter()
        # Python integers: a sum of lengths that are far too large must not overflow into a small one.
        wanted, available = sum(page_counts), self._ledger.available
        if wanted > available:
            raise KVPoolExhausted(
                f"cannot allocate {wanted} pages of {self.page_size} tokens: {available} of {self.num_pages} are free; "
                "free some, run fewer requests at a time or raise size",
                requested=wanted * self.page_size,
                available=available * self.page_size,
            )

    def _check_last(self, prefix: Int64, last: Int64) -> tuple[Int64, Int32]:
        """Checks that ``last`` is the slot of each sequence's last token.

        Returns:
            The pages of ``last`` and how many holders each has, ``[B]``.
        """
        pages = last // self.page_size
        holders = self._ledger.holders(pages)
        none = last == -1
        right = (none == (prefix == 0)) & (none | (holders > 0)) & ((last + 1 - prefix) % self.page_size == 0)
        if np.count_nonzero(right) != right.size:
            at = int(right.argmin())
            raise ShapeError(
                f"sequence {at}: last_loc {last[at]} cannot be the slot of token {prefix[at] - 1} at page_size "
                f"{self.page_size}; it must lie in a held page at that token's offset, and be -1 where there is none"
            )
        return pages, holders

    def _check_appenders(self, tails: Int64, holders: Int32) -> None:
        """Checks that each page that is appended to has one holder and one appender."""
        alone = self._ledger.one_mention(tails) & (holders == 1)
        if np.count_nonzero(alone) != alone.size:
            at = int(alone.argmin())
            raise ShapeError(
                f"cannot append to page {tails[at]}: it has {holders[at]} holders and "
                f"{np.count_nonzero(tails == tails[at])} sequences append to it; both must be 1; share full pages only"
            )


def _join_tails(tails: Int64, has_tail: Bool, fresh: Int32, fresh_counts: Int64) -> Int32:
    """Puts each sequence's partial page before its fresh ones; int32 ``[len(tails) + len(fresh)]``."""
    if not tails.size:
        return fresh
    # A sequence's first fresh page follows the fresh pages of those before it, whether it has any itself or not.
    before = (fresh_counts.cumsum() - fresh_counts)[has_tail]
    return np.insert(fresh, before, tails.astype(np.int32))


def _cut_out(slots: Int32, starts: Int64, ends: Int64) -> Int32:
    """Joins ``slots[start:end]`` of every sequence; slices beat one gather of all tokens: long copies, and few."""
    parts = [slots[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    return np.concatenate(parts)
