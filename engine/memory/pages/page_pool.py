"""The page ledger: how many holders each page has, and since when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from engine.errors import DoubleFreeError, IntegrityError, ShapeError
from engine.memory.integers import Bool, Int32, Int64, integer_vector
from engine.memory.pages.free_runs import FreePages, FreePagesState

T = TypeVar("T")
_INT32 = np.dtype(np.int32)
_ONE = np.int32(1)  # of the counts' dtype: a Python 1 makes np.add.at cast, at five times the cost


@dataclass(frozen=True, eq=False)
class LedgerState:
    """A snapshot: holders and births of every page, and the order of the free pages. Immutable."""

    ref_count: Int32
    births: Int64
    clock: int
    free: FreePagesState


class PageLedger:
    """Reference counts over pages 1 to ``num_pages``.

    A count of 0 is a free page; taking makes it 1. ``clock`` counts the takings, and a page's birth is the clock of
    its last taking, so that slots from before it can be told to be stale.

    Args:
        num_pages: pages, the null page 0 not counted.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.clock = 0
        self._scratch = np.zeros(num_pages + 1, np.int64)
        self.clear()

    def clear(self) -> None:
        """Frees every page, whoever holds it."""
        free = FreePages(self.num_pages)
        # One entry a page, the null page's, and a guard entry at the end.
        ref_count, births = np.zeros(self.num_pages + 2, np.int32), np.zeros(self.num_pages + 1, np.int64)
        self._free, self._ref_count, self._births = free, ref_count, births

    @property
    def available(self) -> int:
        """Free pages."""
        return self._free.count

    def free_pages(self) -> Int32:
        """The free pages in no promised order; int32 ``[available]``, fresh."""
        return self._free.all()

    def take_runs(self, lengths: Int64) -> Int32:
        """Takes ``sum(lengths) <= available`` pages, each length as one run where there is one; int32."""
        return self._born(self._free.take_runs, lengths)

    def take_singles(self, count: int) -> Int32:
        """Takes ``count <= available`` pages that need not be neighbours; int32 ``[count]``."""
        return self._born(self._free.take_singles, count)

    def give_back_since(self, clock: int) -> None:
        """Frees what was taken after the clock stood at ``clock``: how an allocation that raised half way is undone."""
        self._ref_count[:-1][self._births > clock] = 0
        self._refill()

    def holders(self, pages: Int64) -> Int32:
        """Holders of each page, 0 for what is no page of the pool; int32 ``[n]``."""
        # Clipping sends what is out of range to the null page or to the guard entry, which nobody holds.
        return self._ref_count.take(pages, mode="clip")

    def ref_count(self, pages: npt.ArrayLike) -> Int32:
        """Holders of each page; int32 ``[n]``.

        Args:
            pages: page ids from 0 to ``num_pages``, ``[n]``.

        Raises:
            ShapeError: not an integer vector, or a page outside of the pool.
        """
        return self._ref_count[self._known_pages(pages)]

    def retain(self, pages: npt.ArrayLike, *, are_distinct: bool = False) -> None:
        """Adds a holder to each page; a page that is listed n times gets n.

        Args:
            pages: page ids that are held, ``[n]``.
            are_distinct: whether the caller knows that none is listed twice; that is cheaper.

        Raises:
            ShapeError: not an integer vector, or a page that nobody holds: it may be handed out at any time.
        """
        wanted = integer_vector("pages", pages)
        if not wanted.size:
            return
        holders = self.holders(wanted)
        if holders.min() < 1:
            page = int(wanted[holders.argmin()])
            raise ShapeError(f"cannot retain page {page}: nobody holds it; retain a page before its holder releases it")
        if are_distinct:
            self._ref_count[wanted] = holders + _ONE
        else:
            np.add.at(self._ref_count, wanted, _ONE)

    def release(self, pages: npt.ArrayLike) -> None:
        """Takes a holder from each page; a page that is listed n times loses n. At no holder the page is free.

        Args:
            pages: page ids, ``[n]``.

        Raises:
            ShapeError: not an integer vector.
            DoubleFreeError: a page has fewer holders, is the null page or is outside of the pool.
        """
        # One page, as when the prefix cache gives up a leaf, goes without the cost of arrays.
        if isinstance(pages, np.ndarray) and pages.shape == (1,) and self._released_one(pages):
            return
        wanted = integer_vector("pages", pages)
        if wanted.size:
            self._check_range(wanted)
            if self.one_mention(wanted).all():
                self._remove_holders(wanted, 1)
            else:
                distinct, times = np.unique(wanted, return_counts=True)
                self._remove_holders(distinct, times)

    def release_once(self, pages: Int64, *, known_since: int | None) -> None:
        """Takes one holder from each page, however often it is listed.

        Args:
            pages: page ids, ``[n]``, at least one.
            known_since: the clock when the caller was given these pages; None if not known.

        Raises:
            DoubleFreeError: as for ``release``; or a page was taken anew after ``known_since``.
        """
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

    def snapshot(self) -> LedgerState:
        """The present state."""
        ref_count, births = self._ref_count.copy(), self._births.copy()
        ref_count.flags.writeable = births.flags.writeable = False
        return LedgerState(ref_count, births, self.clock, self._free.snapshot())

    def restore(self, state: LedgerState) -> None:
        """Returns to a snapshot of a ledger of as many pages; the clock never runs back."""
        free, ref_count, births = FreePages(self.num_pages), state.ref_count.copy(), state.births.copy()
        free.restore(state.free)
        clock = max(self.clock, state.clock)
        self._free, self._ref_count, self._births, self.clock = free, ref_count, births, clock

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

    def _born(self, take: Callable[[T], Int32], wanted: T) -> Int32:
        """Takes pages and enters them: one holder each, born now."""
        before = self.clock
        try:
            pages = take(wanted)
            if pages.size:
                self.clock += 1
                self._births[pages] = self.clock
                self._ref_count[pages] = 1
            return pages
        except BaseException:
            self.give_back_since(before)
            raise

    def _refill(self) -> None:
        """Makes those pages free that have no holder: what a fault has left of the free pages is not to be trusted."""
        self._free.refill((np.flatnonzero(self._ref_count[1:-1] == 0) + 1).astype(np.int32))

    def _check_range(self, pages: Int64) -> None:
        low, high = int(pages.min()), int(pages.max())
        if low < 1 or high > self.num_pages:
            raise DoubleFreeError(
                f"cannot free page {low if low < 1 else high}: the pool hands out pages 1 to {self.num_pages}, page 0 "
                "is the null page that nobody owns; nothing was freed; free only what was allocated"
            )

    def _released_one(self, page: npt.NDArray[Any]) -> bool:
        """Takes a holder from the one page listed; False, and nothing is done, where that is not an int32 in order."""
        number = page.item()
        if page.dtype != _INT32 or not 0 <= number <= self.num_pages:
            return False
        holders = self._ref_count.item(number)
        if holders == 0:
            return False
        try:
            self._ref_count[number] = holders - 1
            if holders == 1:
                self._free.put(page.copy())
            return holders > 0  # True; the return of a constant stands outside of the try in Python 3.12
        except BaseException:
            self._ref_count[number] = holders
            self._refill()
            raise

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
