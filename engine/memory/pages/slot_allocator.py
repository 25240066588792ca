"""The slot-level contract over a pool of pages: token counts in, slots out.

The split into ``alloc``, ``alloc_extend`` and ``alloc_decode`` is that of SGLang's paged allocator, with which the
signatures are compatible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NewType

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, ShapeError
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
from engine.memory.pages.page_pool import PagePool, PoolState

# Slots, int32 ``[n]``: ``page * page_size + offset``. A type of its own, so that a type checker tells slots from pages.
Slots = NewType("Slots", npt.NDArray[np.int32])


class PagedTokenToKVPoolAllocator:
    """Hands out the slots of a paged pool.

    A caller that keeps pages uses ``pages``; the calls here translate slots to pages. Every call checks everything
    before it changes anything: a refused call changes nothing.

    What ``free`` refuses: a page with no holder (double free), page 0, a slot outside of the pool, an array of page
    ids that the pool handed out. A stale free, of a page that was freed and has been handed out again since, is refused
    when it comes as an array that this allocator returned, or a view of one (see ``handouts``). A copied or
    concatenated array is unknown: then only the reference count can refuse, and the holder must keep its own record
    (``ReqToTokenPool.release`` gives a row's pages once).

    Args:
        size: usable token slots, a multiple of ``page_size``.
        page_size: tokens per page.

    Attributes:
        pages: the pool: pages 1 to ``size / page_size``.

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
        self.pages = PagePool(self.size // self.page_size, self.page_size)
        self.caller = self.pages.caller

    def available_size(self) -> int:
        """Free tokens."""
        return self.pages.available * self.page_size

    def alloc(self, need_size: int) -> Slots:
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
        self.caller.enter()
        self.pages.check_available(count)  # a number that may be beyond any array
        clock = self.pages.clock
        try:
            return self._handed_out(self._slots_of(self.pages.take([count])))
        except BaseException:  # an interrupt too: the caller never learns of these pages
            self.pages.give_back_since(clock)
            raise

    def alloc_extend(self, prefix_lens: npt.ArrayLike, seq_lens: npt.ArrayLike, last_loc: npt.ArrayLike) -> Slots:
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
        self.caller.enter()
        pages, holders = self._check_last(prefix, last)
        new, offsets = ends - prefix, prefix % self.page_size
        appends = (offsets > 0) & (new > 0)
        self._check_appenders(pages[appends], holders[appends])
        fresh_counts = -(-ends // self.page_size) - -(-prefix // self.page_size)
        clock = self.pages.clock
        try:
            fresh = self.pages.take(fresh_counts)
            slots = self._slots_of(_join_tails(pages[appends], appends, fresh, fresh_counts))
            if slots.size > new.sum():
                page_counts = fresh_counts + appends
                starts = (page_counts.cumsum() - page_counts) * self.page_size + offsets * appends
                slots = _cut_out(slots, starts, starts + new)
            return self._handed_out(slots)
        except BaseException:
            self.pages.give_back_since(clock)
            raise

    def alloc_decode(self, seq_lens: npt.ArrayLike, last_loc: npt.ArrayLike) -> Slots:
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
        self.caller.enter()
        pages, holders = self._check_last(ends - 1, last)
        appends = ends % self.page_size != 1 % self.page_size
        self._check_appenders(pages[appends], holders[appends])
        slots = (last + 1).astype(np.int32)
        count = ends.size - int(np.count_nonzero(appends))
        clock = self.pages.clock
        try:
            if count:
                slots[~appends] = self.pages.take_singles(count) * np.int32(self.page_size)
            return self._handed_out(slots)
        except BaseException:
            self.pages.give_back_since(clock)
            raise

    def free(self, slots: Slots | Sequence[int]) -> None:
        """Releases, once each, the pages that ``slots`` lie in.

        Args:
            slots: any integer vector of slots; one slot of a page stands for the page.

        Raises:
            ShapeError: not an integer vector, or an array of page ids that the pool handed out.
            DoubleFreeError: a page has no holder, is the null page or is outside of the pool; or ``slots`` is an
                array that was returned before one of its pages was handed out anew.
        """
        wanted = integer_vector("slots", slots)
        self.caller.enter()
        handout = self.pages.handouts.find(slots)
        if handout is not None and not handout.are_slots:
            raise ShapeError(
                "cannot free these slots: the array holds page ids that the pool handed out; nothing was freed; give "
                "page ids back by pages.release"
            )
        if wanted.size:
            known_since = None if handout is None else handout.known_since
            self.pages.release_once(wanted // self.page_size, known_since=known_since)

    def clear(self) -> None:
        """Frees every page, see ``PagePool.clear``."""
        self.pages.clear()

    def backup_state(self) -> PoolState:
        """A snapshot, see ``PagePool.snapshot``."""
        return self.pages.snapshot()

    def restore_state(self, state: PoolState) -> None:
        """Returns to a snapshot, see ``PagePool.restore``; raises ConfigError where it is of another pool."""
        self.pages.restore(state)

    def check_integrity(self, holders: npt.ArrayLike | None = None) -> None:
        """Proves that free and held pages make up the pool, see ``PagePool.check_integrity``."""
        self.pages.check_integrity(holders)

    def _slots_of(self, pages: Int32) -> Int32:
        """All slots of ``pages``, int32 ``[n * page_size]``, an array that owns its memory."""
        # Filled through a view of two axes: a view is what ``handouts`` would forget, and a copy takes time.
        slots = np.empty(pages.size * self.page_size, np.int32)
        first = (pages * np.int32(self.page_size))[:, None]
        np.add(first, np.arange(self.page_size, dtype=np.int32), out=slots.reshape(pages.size, self.page_size))
        return slots

    def _handed_out(self, slots: Int32) -> Slots:
        self.pages.handouts.record(slots, self.pages.clock, are_slots=True)
        return Slots(slots)

    def _check_last(self, prefix: Int64, last: Int64) -> tuple[Int64, Int32]:
        """Checks that ``last`` is the slot of each sequence's last token.

        Returns:
            The pages of ``last`` and how many holders each has, ``[B]``.
        """
        pages = last // self.page_size
        holders = self.pages.holders(pages)
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
        alone = self.pages.one_mention(tails) & (holders == 1)
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
