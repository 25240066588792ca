"""The free pages, kept as runs of neighbours, so that pages taken together lie together.

    runs      by length, then by place; pages are taken from the smallest run that holds them (best fit)
    singles   a stock of single pages for decoding, cut from the ends of the shortest runs
    loose     pages given back since the runs were last put in order

Giving back is an append, and taking a single page is a slice: neither looks at the rest of the pool. Loose pages and
singles join the runs before a run is taken, where that is little work or they are many. So the fit is exact in a pool
of up to ``CHEAP_WORK`` times ``PAGES_PER_RUN`` pages in few runs; in a larger one the cost per page stays constant.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from engine.memory.integers import Bool, Int32, Int64, ranges

# Putting all pages in order costs a look at each run and, at a fraction of that, at each page of the pool. CHEAP_WORK
# is done whenever a run is taken; more, once the pages that are not in order exceed a LOOSE_SHARE-th of the work.
CHEAP_WORK, PAGES_PER_RUN, LOOSE_SHARE = 4_096, 64, 8
SINGLES_AT_ONCE = 256  # pages, at least, that the stock of singles is filled up to
_PLACE_BITS = 32  # a run is one integer, its length above its first page: they sort by length
_PLACE = (1 << _PLACE_BITS) - 1


@dataclass(frozen=True, eq=False)
class FreePagesState:
    """A snapshot; shares arrays with the live object, which never writes them in place."""

    runs: tuple[int, ...]
    singles: Int32
    loose: tuple[Int32, ...]


class FreePages:
    """The set of pages without a holder.

    It trusts its caller: pages given back are distinct and were taken before. After a call that raised, the caller
    calls ``refill``.

    Args:
        num_pages: pages; 1 to ``num_pages`` are free at first.
    """

    def __init__(self, num_pages: int) -> None:
        self._work = num_pages // PAGES_PER_RUN
        self._is_in_runs: Bool = np.zeros(num_pages + 2, np.bool_)  # by page; the entries at both ends stay False
        self._is_in_runs[1:-1] = True
        self._singles: Int32 = np.empty(0, np.int32)
        self.restore(FreePagesState((num_pages << _PLACE_BITS | 1,) if num_pages else (), self._singles, ()))

    def refill(self, pages: Int32) -> None:
        """Makes ``pages`` the free ones, and no others."""
        self.restore(FreePagesState((), pages[:0], (pages,)))
        self._put_in_order()

    @property
    def count(self) -> int:
        """Free pages."""
        return self._in_runs + self._singles.size + self._loose_count

    def all(self) -> Int32:
        """All free pages in no promised order; int32 ``[count]``, fresh."""
        return np.concatenate([_pages_of(self._runs), self._singles, *self._loose])

    def put(self, pages: Int32) -> None:
        """Gives pages back; keeps the array itself."""
        if pages.size:
            self._loose.append(pages)
            self._loose_count += pages.size

    def take_singles(self, count: int) -> Int32:
        """Takes ``count <= self.count`` pages that need not be neighbours, from the shortest runs."""
        if count > self._singles.size:
            self._stock_up(count)
        left = self._singles.size - count
        taken = self._singles[left:].copy()
        self._singles = self._singles[:left]
        return taken

    def take_runs(self, lengths: Int64) -> Int32:
        """Takes ``sum(lengths) <= self.count`` pages, each length from the smallest run that holds it.

        Where none does, the longest runs are joined.

        Args:
            lengths: ``[B]`` pages per sequence, none negative.

        Returns:
            int32 ``[sum(lengths)]`` page ids, one sequence after the other.
        """
        total, aside = int(lengths.sum()), self._loose_count + self._singles.size
        if not total:
            return np.empty(0, np.int32)
        if aside:
            work = self._work + len(self._runs)
            if work <= CHEAP_WORK or aside * LOOSE_SHARE >= work or total > self._in_runs:
                self._put_in_order()
        self._in_runs -= total
        longest = self._runs[-1]
        second = self._runs[-2] >> _PLACE_BITS if len(self._runs) > 1 else 0
        if total <= longest >> _PLACE_BITS and second < lengths.min(where=lengths > 0, initial=total):
            self._shorten(len(self._runs) - 1, total)  # no other run holds any of them
            return np.arange(longest & _PLACE, (longest & _PLACE) + total, dtype=np.int32)
        return self._take_one_by_one(lengths.tolist())

    def snapshot(self) -> FreePagesState:
        """The present state."""
        for pages in (self._singles, *self._loose):
            pages.flags.writeable = False
        return FreePagesState(tuple(self._runs), self._singles, tuple(self._loose))

    def restore(self, state: FreePagesState) -> None:
        """Returns to a snapshot of a set for as many pages."""
        self._runs = list(state.runs)  # ascending
        self._is_in_runs[:] = False
        self._is_in_runs[_pages_of(self._runs)] = True
        self._in_runs = sum(run >> _PLACE_BITS for run in state.runs)
        self._singles = state.singles
        self._loose = list(state.loose)
        self._loose_count = sum(pages.size for pages in state.loose)

    def _shorten(self, at: int, count: int) -> None:
        """Takes the first pages off a run."""
        run = self._runs.pop(at)
        first = run & _PLACE
        self._is_in_runs[first : first + count] = False
        if count < run >> _PLACE_BITS:
            insort(self._runs, run - (count << _PLACE_BITS) + count, 0, at)

    def _take_one_by_one(self, lengths: list[int]) -> Int32:
        taken: list[int] = []
        for length in lengths:
            while length and length > self._runs[-1] >> _PLACE_BITS:
                taken.append(self._runs[-1])
                length -= taken[-1] >> _PLACE_BITS
                self._shorten(len(self._runs) - 1, taken[-1] >> _PLACE_BITS)
            if length:
                at = bisect_left(self._runs, length << _PLACE_BITS)
                taken.append(length << _PLACE_BITS | self._runs[at] & _PLACE)
                self._shorten(at, length)
        return _pages_of(taken)

    def _stock_up(self, count: int) -> None:
        """Fills the stock of singles from the shortest runs, the shortest last."""
        left_over = self._singles
        if self._loose:
            self._put_in_order()
            left_over = self._singles
        least = max(SINGLES_AT_ONCE, (self._work + len(self._runs)) // LOOSE_SHARE)
        wanted = min(max(count - left_over.size, least), self._in_runs)
        self._in_runs -= wanted
        taken, left = 0, wanted
        while left and self._runs[taken] >> _PLACE_BITS <= left:
            left -= self._runs[taken] >> _PLACE_BITS
            taken += 1
        short = self._runs[:taken]
        if left:  # the end of one more run
            rest = self._runs[taken] - (left << _PLACE_BITS)
            short.append(left << _PLACE_BITS | (rest & _PLACE) + (rest >> _PLACE_BITS))
            self._runs[: taken + 1] = [rest]
            self._runs.sort()
        else:
            del self._runs[:taken]
        singles = _pages_of(short[::-1])
        self._is_in_runs[singles] = False
        self._singles = np.concatenate([singles, left_over])
        self._singles.flags.writeable = False

    def _put_in_order(self) -> None:
        """Joins all free pages into runs."""
        self._is_in_runs[np.concatenate([self._singles, *self._loose])] = True
        edges = (self._is_in_runs[1:] != self._is_in_runs[:-1]).nonzero()[0]
        before, last = edges[::2], edges[1::2]
        runs = (last - before << _PLACE_BITS) + before + 1
        runs.sort()
        self._runs = runs.tolist()
        self._in_runs, self._loose_count = self.count, 0
        self._singles, self._loose = self._singles[:0], []


def _pages_of(runs: list[int]) -> Int32:
    """The pages of runs, one after the other; int32, fresh."""
    both = np.array(runs, np.int64)
    return ranges(both & _PLACE, both >> _PLACE_BITS).astype(np.int32)
