"""The pool of pages: how many holders each page has, since when, and which pages are free.

Reference counts on pages follow PagedAttention (arXiv 2309.06180).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NewType, TypeVar

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, DoubleFreeError, IntegrityError, KVPoolExhausted, ShapeError
from engine.memory.integers import Bool, Int32, Int64, integer_vector, whole_number
from engine.memory.one_caller import OneCaller
from engine.memory.pages.free_runs import FreePages, FreePagesState
from engine.memory.pages.handouts import Handouts

T = TypeVar("T")
# Page ids, int32 ``[n]``. A type of its own, so that a type checker tells pages from slots.
PageIds = NewType("PageIds", npt.NDArray[np.int32])

_ONE = np.int32(1)  # of the counts' dtype: a Python 1 makes np.add.at cast, at five times the cost

NO_PAGES = PageIds(np.empty(0, np.int32))
NO_PAGES.flags.writeable = False


@dataclass(frozen=True, eq=False)
class PoolState:
    """A snapshot of a pool: holders and births of every page, and the order of the free pages. Immutable."""

    num_pages: int
    page_size: int
    ref_count: Int32
    births: Int64
    clock: int
    free: FreePagesState
    void: frozenset[int]


class PagePool:
    """Reference counts over pages 1 to ``num_pages``; page 0 is the null page, which has no owner.

    A count of 0 is a free page. ``take`` makes the count 1, ``retain`` and ``release`` change it. Every call checks
    everything before it changes anything: a refused call changes nothing.

    ``clock`` counts the takings. A page's birth is the clock of its last taking, so that slots from before it can be
    told to be stale. Arrays that were handed out are remembered while they live (see ``handouts``): slots that are
    passed where pages are meant are refused.

    Args:
        num_pages: pages, the null page not counted.
        page_size: tokens per page; read by messages only.

    Attributes:
        caller: the one thread that may change the pool at a time.
        clock: how often pages have been taken.
        handouts: the arrays of pages and of slots that were handed out.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.caller = OneCaller()
        self.clock = 0
        self.handouts = Handouts()
        self._scratch = np.zeros(num_pages + 1, np.int64)
        self.clear()

    def clear(self) -> None:
        """Frees every page, held or not; a later free through an array from before is refused."""
        self.caller.enter()
        free = FreePages(self.num_pages)
        # One entry per page, the null page's, and a guard entry at the end.
        ref_count, births = np.zeros(self.num_pages + 2, np.int32), np.zeros(self.num_pages + 1, np.int64)
        self._free, self._ref_count, self._births = free, ref_count, births

    @property
    def available(self) -> int:
        """Free pages."""
        return self._free.count

    def check_available(self, count: int) -> None:
        """Raises KVPoolExhausted, in tokens of whole pages, where fewer than ``count`` pages are free."""
        available = self._free.count
        if count > available:
            raise KVPoolExhausted(
                f"cannot allocate {count} pages of {self.page_size} tokens: {available} of {self.num_pages} are free; "
                "free some, run fewer requests at a time or raise size",
                requested=count * self.page_size,
                available=available * self.page_size,
            )

    def free_pages(self) -> PageIds:
        """The free pages in no promised order; ``[available]``, a fresh array."""
        return PageIds(self._free.all())

    def take(self, counts: npt.ArrayLike) -> PageIds:
        """Takes pages for several sequences, for each sequence one run of neighbours where there is one.

        Args:
            counts: ``[B]`` pages of each sequence, 0 or more.

        Returns:
            ``[sum(counts)]`` page ids, one sequence after the other; each page has one holder.

        Raises:
            ShapeError: not a vector of integers, or a count is negative.
            KVPoolExhausted: fewer pages are free.
        """
        wanted = integer_vector("counts", counts)
        self.caller.enter()
        lengths = wanted.tolist()
        least = min(lengths, default=0)
        if least < 0:
            raise ShapeError(f"sequence {wanted.argmin()}: count is {least} pages; it must be 0 or more")
        # Python integers: a sum of lengths that are far too large must not overflow into a small one.
        self.check_available(sum(lengths))
        return self._born(self._free.take_runs, wanted if least else wanted[wanted > 0])

    def take_singles(self, count: int) -> PageIds:
        """Takes pages that need not be neighbours, from the shortest runs; each page has one holder.

        Args:
            count: pages, 0 or more.

        Returns:
            ``[count]`` page ids.

        Raises:
            ShapeError: ``count`` is negative or not an integer.
            KVPoolExhausted: fewer pages are free.
        """
        wanted = whole_number("count", count)
        self.caller.enter()
        self.check_available(wanted)
        return self._born(self._free.take_singles, wanted)

    def give_back_since(self, clock: int) -> None:
        """Frees what was taken after ``clock``, for a caller that raises before it has recorded the pages.

        These pages must not have been retained or released since, and the caller must have entered ``caller`` before it
        read ``clock``.
        """
        if self.clock > clock:
            self._free_since(clock)

    def holders(self, pages: Int64) -> Int32:
        """Holders of each page, 0 for a number that is no page of the pool; int32 ``[n]``."""
        # Clipping sends what is out of range to the null page or to the guard entry, which have no holder.
        return self._ref_count.take(pages, mode="clip")

    def ref_count(self, pages: npt.ArrayLike) -> Int32:
        """Holders of each page; int32 ``[n]``.

        Args:
            pages: page ids from 0 to ``num_pages``, ``[n]``.

        Raises:
            ShapeError: not an integer vector, or a page outside of the pool.
        """
        return self._ref_count[self._known_pages(pages)]

    def retain(self, pages: PageIds | Sequence[int], *, are_distinct: bool = False) -> None:
        """Adds a holder to each page; a page that is listed n times gets n.

        Args:
            pages: page ids that are held, ``[n]``.
            are_distinct: whether the caller knows that no page is listed twice; that is cheaper.

        Raises:
            ShapeError: not an integer vector, an array of slots, or a page without a holder: it may be handed out at
                any time.
        """
        wanted = integer_vector("pages", pages)
        self.caller.enter()
        self._refuse_slots(pages, "retain")
        if not wanted.size:
            return
        holders = self.holders(wanted)
        if holders.min() < 1:
            page = int(wanted[holders.argmin()])
            raise ShapeError(f"cannot retain page {page}: it has no holder; retain a page while it is held")
        if are_distinct:
            self._ref_count[wanted] = holders + _ONE
        else:
            np.add.at(self._ref_count, wanted, _ONE)

    def release(self, pages: PageIds | Sequence[int]) -> None:
        """Takes a holder from each page; a page that is listed n times loses n. A page without a holder is free.

        Args:
            pages: page ids, ``[n]``.

        Raises:
            ShapeError: not an integer vector, or an array of slots.
            DoubleFreeError: a page has fewer holders, is the null page or is outside of the pool.
        """
        self.caller.enter()
        self._refuse_slots(pages, "release")
        wanted = integer_vector("pages", pages)
        if wanted.size:
            self._check_range(wanted)
            if self.one_mention(wanted).all():
                self._remove_holders(wanted, 1)
            else:
                distinct, times = np.unique(wanted, return_counts=True)
                self._remove_holders(distinct, times)

    def release_one(self, page: int) -> None:
        """Takes a holder from one page, without the cost of arrays, as when the prefix cache gives up a leaf.

        Raises:
            ShapeError, DoubleFreeError: as for ``release``.
        """
        self.caller.enter()
        holders = self._ref_count.item(page) if type(page) is int and 0 <= page <= self.num_pages else 0
        if not holders:
            self.release([page])  # which refuses it
            return
        try:
            self._ref_count[page] = holders - 1
            if holders == 1:
                self._free.put(np.array([page], np.int32))
        except BaseException:
            self._ref_count[page] = holders
            self._refill()
            raise

    def release_once(self, pages: Int64, *, known_since: int | None) -> None:
        """Takes one holder from each page, however often it is listed.

        Args:
            pages: page ids, ``[n]``, at least one.
            known_since: the clock when the caller was given these pages; None if not known.

        Raises:
            DoubleFreeError: as for ``release``; or a page was taken anew after ``known_since``.
        """
        self.caller.enter()
        self._check_range(pages)
        distinct = pages[self.one_mention(pages)]
        if known_since is not None and (stale := self._births[distinct] > known_since).any():
            raise DoubleFreeError(
                f"cannot free page {distinct[stale.argmax()]} through these slots: they are stale, the page was freed "
                "and handed out again since; nothing was freed; forget slots once they are freed"
            )
        self._remove_holders(distinct, 1)

    def one_mention(self, pages: Int64) -> Bool:
        """True at one mention of each page, ``[n]``; without a sort: only the last to write a table entry is in it."""
        index = np.arange(pages.size)
        self._scratch[pages] = index
        return np.equal(self._scratch[pages], index)

    def snapshot(self) -> PoolState:
        """What is free, in which order, and how many holders each page has."""
        ref_count, births = self._ref_count.copy(), self._births.copy()
        ref_count.flags.writeable = births.flags.writeable = False
        free, void = self._free.snapshot(), self.handouts.void_serials()
        return PoolState(self.num_pages, self.page_size, ref_count, births, self.clock, free, void)

    def restore(self, state: PoolState) -> None:
        """Returns to a snapshot, whole: exactly the free pages and the counts of that moment; the clock continues.

        Pages taken since are free again, and slots returned since are void: a free through them is refused. Pages
        freed since are held again. A state may be restored any number of times.

        Raises:
            ConfigError: not a state, or one of a pool of other size or page size.
        """
        if not isinstance(state, PoolState):
            raise ConfigError(f"cannot restore a {type(state).__name__}; pass what snapshot or backup_state returned")
        if (state.num_pages, state.page_size) != (self.num_pages, self.page_size):
            raise ConfigError(
                f"cannot restore a state of {state.num_pages} pages of {state.page_size} tokens into a pool of "
                f"{self.num_pages} pages of {self.page_size}; both must be equal"
            )
        self.caller.enter()
        before = self.snapshot()
        try:
            self._become(state)
        except BaseException:
            self._become(before)
            raise

    def check_integrity(self, holders: npt.ArrayLike | None = None) -> None:
        """Proves that every page but page 0 is either free, once, or held.

        Args:
            holders: page ids, ``[n]``, each listed once per holder; if given, the counts must be just these.

        Raises:
            IntegrityError: names the first wrong page.
        """
        times_free = np.bincount(self._free.all(), minlength=self._ref_count.size)
        expected = np.ones(self._ref_count.size, np.int64)
        expected[[0, -1]] = 0
        right = times_free + (self._ref_count > 0) == expected
        right &= self._ref_count >= 0
        if not right.all():
            page = int(right.argmin())
            raise IntegrityError(
                f"page {page} is {times_free[page]} times in the free set and has {self._ref_count[page]} holders; "
                "the null page 0 is neither free nor held, any other is free once or held; this is a bug, report it"
            )
        if holders is None:
            return
        listed = np.bincount(self._known_pages(holders), minlength=self._ref_count.size)
        if not (self._ref_count == listed).all():
            page = int((self._ref_count != listed).argmax())
            raise IntegrityError(
                f"page {page} has a count of {self._ref_count[page]} holders and {listed[page]} list it; the count "
                "must equal the list; a holder leaked it or released it twice"
            )

    def _known_pages(self, pages: npt.ArrayLike) -> Int64:
        wanted = integer_vector("pages", pages)
        if wanted.size and (wanted.min() < 0 or wanted.max() > self.num_pages):
            raise ShapeError(f"pages go from {wanted.min()} to {wanted.max()}; the pool has 0 to {self.num_pages}")
        return wanted

    def _born(self, take: Callable[[T], Int32], wanted: T) -> PageIds:
        """Takes pages and enters them: one holder each, born now."""
        before = self.clock
        try:
            pages = PageIds(take(wanted))
            if pages.size:
                self.clock += 1
                self._births[pages] = self.clock
                self._ref_count[pages] = 1
            self.handouts.record(pages, self.clock, are_slots=False)
            return pages
        except BaseException:  # an interrupt too: the caller never learns of these pages
            self._free_since(before)
            raise

    def _free_since(self, clock: int) -> None:
        self._ref_count[:-1][self._births > clock] = 0
        self._refill()

    def _refill(self) -> None:
        """Makes those pages free that have no holder: what a fault has left of the free pages is not to be trusted."""
        self._free.refill((np.flatnonzero(self._ref_count[1:-1] == 0) + 1).astype(np.int32))

    def _become(self, state: PoolState) -> None:
        free, ref_count, births = FreePages(self.num_pages), state.ref_count.copy(), state.births.copy()
        free.restore(state.free)
        clock = max(self.clock, state.clock)  # it never runs back
        self._free, self._ref_count, self._births, self.clock = free, ref_count, births, clock
        self.handouts.rewind(state.clock, state.void)

    def _refuse_slots(self, pages: object, what: str) -> None:
        handout = self.handouts.find(pages)
        if handout is not None and handout.are_slots:
            raise ShapeError(
                f"cannot {what} these pages: the array holds slots that were handed out; nothing was changed; "
                "a slot is page * page_size + offset: pass page ids, or give slots to free"
            )

    def _check_range(self, pages: Int64) -> None:
        low, high = int(pages.min()), int(pages.max())
        if low < 1 or high > self.num_pages:
            raise DoubleFreeError(
                f"cannot free page {low if low < 1 else high}: the pool hands out pages 1 to {self.num_pages}, page 0 "
                "is the null page, which has no owner; nothing was freed; free only what was allocated"
            )

    def _remove_holders(self, pages: Int64, times: Int64 | int) -> None:
        """Takes ``times`` holders from each of distinct pages, or from none of them."""
        holders = self._ref_count[pages]
        left = holders - times
        if left.min() < 0:
            page = int(pages[left.argmin()])
            raise DoubleFreeError(
                f"cannot free page {page}: it has {self._ref_count[page]} holders, {left.min()} would be left; "
                "nothing was freed; free each page once per allocation or retain"
            )
        freed = pages[left == 0].astype(np.int32)
        try:
            self._ref_count[pages] = left
            self._free.put(freed)
        except BaseException:
            self._ref_count[pages] = holders
            self._refill()
            raise
