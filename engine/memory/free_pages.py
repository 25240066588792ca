"""The free pages, kept so that what is taken together lies together.

    pages   [ longest run …… | next longest … | …… | singles ]      loose: given back since the last merge
              ^head: runs are taken here      tail: singles are taken here^

Taking is a slice and giving back is an append: neither looks at the rest of the pool. Loose pages come back in
order, merged into runs with what is left, when the ordered part is too short or when so many are loose that merging
is paid for by what was given back; so the cost a page stays constant whatever the size of the pool. A side effect
that helps to find bugs: a page is not reused while older free pages last, so most stale frees hit a free page.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.memory.integers import Int32, Int64, ranges

# A merge waits until this share of the free pages is loose: in a full pool pages are few and come back one by one.
LOOSE_SHARE = 8
# Marking the pages in a table of the pool beats sorting them once they are this share of it.
DENSE_SHARE = 16


@dataclass(frozen=True, eq=False)
class FreePagesState:
    """A snapshot; shares arrays with the live object, which never writes them in place."""

    pages: Int32
    run_ends: Int64
    head: int
    tail: int
    loose: tuple[Int32, ...]


class FreePages:
    """An ordered bag of the pages that nobody holds.

    It trusts its caller: pages given back are distinct and were taken before.

    Args:
        num_pages: pages 1 to ``num_pages`` are free at first.
    """

    def __init__(self, num_pages: int) -> None:
        self._num_pages = num_pages
        self._pages = np.arange(1, num_pages + 1, dtype=np.int32)
        self._run_ends = np.array([num_pages], np.int64)
        self._head, self._tail = 0, num_pages
        self._loose: list[Int32] = []
        self._loose_count = 0

    @property
    def count(self) -> int:
        """Free pages, ordered and loose."""
        return self._tail - self._head + self._loose_count

    def all(self) -> Int32:
        """All free pages in no promised order; int32 ``[count]``, fresh."""
        return np.concatenate([self._pages[self._head : self._tail], *self._loose])

    def put(self, pages: Int32) -> None:
        """Gives pages back."""
        if pages.size:
            self._loose.append(pages)
            self._loose_count += pages.size

    def take_singles(self, count: int) -> Int32:
        """Takes ``count <= self.count`` pages that need not be neighbours, from the shortest runs."""
        if count > self._tail - self._head:
            self._merge()
        self._tail -= count
        return self._pages[self._tail : self._tail + count]

    def take_runs(self, lengths: Int64) -> Int32:
        """Takes ``sum(lengths) <= self.count`` pages, each length as one ascending run where one is in order.

        Args:
            lengths: pages per sequence, ``[B]``, none negative.

        Returns:
            int32 ``[sum(lengths)]``, one sequence's pages after the other's.
        """
        total = int(lengths.sum())
        short = total > self._tail - self._head
        if short or (total > self._run_left() and self._merge_pays()):
            self._merge()
        if total <= self._run_left():
            return self._take_head(total)
        return self._take_run_by_run(lengths.tolist(), total)

    def snapshot(self) -> FreePagesState:
        """The present state, at no cost in pages."""
        return FreePagesState(self._pages, self._run_ends, self._head, self._tail, tuple(self._loose))

    def restore(self, state: FreePagesState) -> None:
        """Returns to a snapshot of a bag of the same size."""
        self._pages, self._run_ends = state.pages, state.run_ends
        self._head, self._tail = state.head, state.tail
        self._loose = list(state.loose)
        self._loose_count = sum(pages.size for pages in state.loose)

    def _run_left(self) -> int:
        """Pages left of the run at the head."""
        run = int(self._run_ends.searchsorted(self._head, side="right"))
        end = int(self._run_ends[run]) if run < self._run_ends.size else self._tail
        return min(end, self._tail) - self._head

    def _take_head(self, count: int) -> Int32:
        self._head += count
        return self._pages[self._head - count : self._head]

    def _take_run_by_run(self, lengths: list[int], total: int) -> Int32:
        """Takes from the head; sets the rest of a run aside where the next run fits a sequence whole."""
        first = int(self._run_ends.searchsorted(self._head, side="right"))
        # Each run that is passed costs a taken page or is set aside for a sequence, which bounds how many are seen.
        ends = self._run_ends[first : first + total + len(lengths) + 1].tolist()
        run, parts, wanted = 0, [], total
        for length in lengths:
            while run < len(ends) and ends[run] <= self._head:
                run += 1
            if run + 1 < len(ends) and ends[run] < self._tail:
                left, following = ends[run] - self._head, min(ends[run + 1], self._tail) - ends[run]
                if left < length <= following and wanted <= self._tail - ends[run]:
                    self.put(self._take_head(left))
            parts.append(self._take_head(length))
            wanted -= length
        return np.concatenate(parts)

    def _merge_pays(self) -> bool:
        return self._loose_count > 0 and self._loose_count * LOOSE_SHARE >= self.count

    def _merge(self) -> None:
        """Orders all free pages into runs, the longest first."""
        pages = self._ascending()
        breaks = (pages[1:] - pages[:-1] != 1).nonzero()[0]
        first = np.zeros(breaks.size + 1, np.int64)
        np.add(breaks, 1, out=first[1:])
        lengths = np.empty_like(first)
        np.subtract(first[1:], first[:-1], out=lengths[:-1])
        lengths[-1] = pages.size - first[-1]
        # NumPy sorts 16-bit keys by radix, many times as fast; the order among giant runs does not matter.
        order = np.argsort(np.uint16(0xFFFF) - np.minimum(lengths, 0xFFFF).astype(np.uint16), kind="stable")
        lengths = lengths[order]
        self._pages = ranges(pages[first[order]].astype(np.int64), lengths).astype(np.int32)
        self._run_ends = lengths.cumsum()
        self._head, self._tail = 0, pages.size
        self._loose, self._loose_count = [], 0

    def _ascending(self) -> Int32:
        pages = self.all()
        if pages.size * DENSE_SHARE < self._num_pages:
            return np.sort(pages)
        is_free = np.zeros(self._num_pages + 1, np.bool_)
        is_free[pages] = True
        return np.flatnonzero(is_free).astype(np.int32)
