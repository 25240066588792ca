"""The pages of every group that stand for one page of tokens in the prefix cache, and which of them may go alone.

An *entry* is a page of tokens in the trees. With full attention its number is the page of the first group. It has a
page in every group of full attention, always, and in a group with a window as long as that is worth its memory. A
prefix is a hit where its entries have the window's last pages (``longest_hit``); earlier ones nobody reads.

The pages of windows may be evicted while the entry stays. A page is *idle* when the cache alone holds it: of an entry
that a request sees through a large window, that of a small window may be. Of those that are idle, the *cold* go first:
pages from the middle of sequences, which a window has passed; and among these those *near* the end of a sequence last,
because the next request may put another question in place of the last. *Warm* are the pages at the end of a sequence,
where the next turn goes on, and those that a hit has used before, as at the end of a common system prompt; they are as
old as their last use, by the same clock as the nodes of the trees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import IntegrityError
from engine.memory.integers import Bool, Int32, Int64
from engine.memory.pages import PagePool
from engine.memory.prefix.eviction import Evictable, EvictionOrder
from engine.memory.prefix.tree import RadixNode

NO_NODE = None
NEAR_WINDOWS = 3  # before the last one of a sequence


def pages_seen(window: int, page_size: int) -> int:
    """Pages before the end of a prefix of whole pages that the token after it sees."""
    return -(-(window - 1) // page_size)


def longest_hit(has_page: Bool, pages_needed: Sequence[int]) -> int:
    """The most pages of a prefix after which a sequence can go on.

    Args:
        has_page: ``[groups, n]`` whether each page of the prefix is there, of each group with a window.
        pages_needed: of each of these groups, see ``pages_seen``.

    Returns:
        The largest ``m`` up to ``n`` for which each group has its last ``pages_needed`` pages before ``m``, or all.
    """
    count = has_page.shape[1]
    ends = np.arange(1, count + 1)
    can_end: Bool = np.ones(count, np.bool_)
    for has, needed in zip(has_page, pages_needed, strict=True):
        last_gap = np.maximum.accumulate(np.where(has, -1, ends - 1))
        can_end &= last_gap < np.maximum(ends - needed, 0)
    found = can_end.nonzero()[0]
    return int(ends[found[-1]]) if found.size else 0


class IdlePages(Evictable):
    """The idle window pages of one entry.

    Attributes:
        entry: the entry.
        num_pages: how many they are.
        is_warm: whether they stand among the warm ones.
    """

    __slots__ = ("entry", "is_warm", "num_pages")

    def __init__(self, entry: int, num_pages: int, level: int, stamp: int, *, is_warm: bool) -> None:
        super().__init__(level, stamp)
        self.entry = entry
        self.num_pages = num_pages
        self.is_warm = is_warm


class EntryPages:
    """Pages by group and entry, and the orders of eviction of window pages.

    Args:
        windows: the window of each group; None is full attention.
        page_size: tokens per page.
        pool: counts the holders.

    Attributes:
        num_full: groups of full attention.
        windowed: the other groups.
        needed: of each of those, the pages before the end of a prefix that the next token sees.
        window_pages: pages of windows that the cache has.
        idle_pages: those of them that nobody else holds.
    """

    def __init__(self, windows: Sequence[int | None], page_size: int, pool: PagePool) -> None:
        self._pool = pool
        self.num_groups = len(windows)
        self.full = np.array([group for group, window in enumerate(windows) if window is None], np.int64)
        self.num_full = self.full.size
        self.windowed = np.array([group for group, window in enumerate(windows) if window is not None], np.int64)
        self.needed = [pages_seen(window, page_size) for window in windows if window is not None]
        # Without full attention there is no page to be the entry's number, and entries outnumber the pages.
        self._fresh = None if self.num_full else list(range(pool.num_pages, 0, -1))
        self._make_columns(pool.num_pages + 1)
        self._entry_of = np.zeros(pool.num_pages + 2, np.int32)  # of each page of a window
        self._start_orders()

    def _make_columns(self, count: int) -> None:
        self._table = np.zeros((self.num_groups, count), np.int32)
        self._level, self._stamp = np.zeros((2, count), np.int64)
        self._column = np.zeros(count, np.int32)
        self._ends: npt.NDArray[np.object_] = np.full(count, NO_NODE, np.object_)
        self._is_used: Bool = np.zeros(count, np.bool_)
        self._is_end: Bool = np.zeros(count, np.bool_)
        self._is_near: Bool = np.zeros(count, np.bool_)

    def _columns(self) -> tuple[npt.NDArray[Any], ...]:
        flags = self._is_used, self._is_end, self._is_near
        return self._table, self._level, self._stamp, self._column, self._ends, *flags

    def _start_orders(self) -> None:
        self._idle: dict[int, IdlePages] = {}
        self._cold: EvictionOrder[IdlePages] = EvictionOrder()  # by level: those near an end have the higher one
        self._warm: EvictionOrder[IdlePages] = EvictionOrder()
        self.idle_pages = 0
        self.window_pages = int(np.count_nonzero(self._table[self.windowed]))

    def of(self, entries: Int32) -> Int32:
        """Their pages, 0 where there is none; int32 ``[groups, n]``, fresh."""
        pages: Int32 = self._table[:, entries]
        return pages

    def hit_length(self, entries: Int32) -> int:
        """How many of a prefix's entries a request can go on after; see ``longest_hit``."""
        return longest_hit(self._table[np.ix_(self.windowed, entries)] > 0, self.needed)

    def new_entries(self, pages: Int32) -> Int32:
        """Numbers for entries that are to have these pages, ``[groups, n]``; int32 ``[n]``."""
        if self._fresh is None:
            first: Int32 = pages[0]
            return first
        count = pages.shape[1]
        if count > len(self._fresh):
            self._lengthen(max(count, self._level.size))
        return np.array([self._fresh.pop() for _ in range(count)], np.int32)

    def put(self, entries: Int32, pages: Int32, end: RadixNode | None, first_column: int) -> None:
        """Gives entries their pages; a page that is 0 changes nothing.

        Args:
            entries: ``[n]`` consecutive entries of a sequence.
            pages: ``[groups, n]``, of which the cache has become a holder.
            end: a node at or below whose end the entries lie.
            first_column: place of the first of them in its sequence, in pages.
        """
        given, before = pages > 0, self._table[:, entries]
        self._table[:, entries] = np.where(given, pages, before)
        for group in self.windowed.tolist():
            self._entry_of[pages[group, given[group]]] = entries[given[group]]
        self._column[entries] = np.arange(first_column, first_column + entries.size)
        self._ends[entries] = end
        self.window_pages += int(np.count_nonzero((given & (before == 0))[self.windowed]))

    def missing(self, entries: Int32, pages: Int32) -> Int32:
        """Which of these pages, ``[groups, n]``, the entries lack; int32 ``[groups, n]``, 0 elsewhere."""
        return np.where(self._table[:, entries] == 0, pages, 0).astype(np.int32)

    def take_out(self, entries: Int32) -> Int32:
        """Takes the pages of entries that leave the trees; int32 ``[n]``, for the cache to give back."""
        pages = self.of(entries)
        taken = pages[pages > 0]
        for entry in entries[(pages[self.windowed] > 0).any(axis=0)].tolist():
            self._leave_order(entry)
        self._clear(entries)
        return taken

    def take_windows(self, entry: int) -> Int32:
        """Takes the idle window pages of an entry that stays; int32 ``[groups]``, 0 where there was none."""
        self._leave_order(entry)
        pages = self._table[:, entry].copy()
        pages[self.full] = 0
        pages[~self._is_alone(pages)] = 0
        self._entry_of[pages[pages > 0]] = 0
        self._table[pages > 0, entry] = 0
        self.window_pages -= int(np.count_nonzero(pages))
        return pages

    def restore(self, entries: Int32, pages: Int32) -> None:
        """Undoes ``take_out`` and ``take_windows`` of entries that had ``pages[groups, n]``, for ``rebuild``."""
        self._table[:, entries] = np.maximum(pages, self._table[:, entries])

    def withdraw(self, entries: Int32, pages: Int32) -> None:
        """Undoes ``put`` of ``pages[groups, n]``, as far as ``rebuild`` needs it."""
        held = self._table[:, entries]
        self._table[:, entries] = np.where((pages > 0) & (held == pages), 0, held)

    def empty_end(self, entries: Int32) -> int:
        """How many of the last of these entries have no page any more."""
        if self._table[:, entries[-1]].any():
            return 0
        has: Bool = np.any(self._table[:, entries[::-1]], axis=0)
        return int(has.argmax()) if has.any() else has.size

    def last_seen(self, entries: Int32, windows: int = 1) -> Int32:
        """The last entries that a token after them sees through the largest window, or through so many of them."""
        return entries[max(0, entries.size - windows * max(self.needed, default=0)) :]

    def use(self, entries: Int32, level: int, stamp: int) -> None:
        """Notes that a hit ends after these entries: the window pages before its end are warm from now on."""
        seen = self.last_seen(entries)
        self._is_used[seen] = True
        self._level[seen] = np.maximum(self._level[seen], level)
        self._reorder(seen, stamp)

    def end_at(self, entries: Int32, level: int, stamp: int) -> None:
        """Notes that a sequence ends after these entries: its last window pages are warm, and some before them near."""
        seen = self.last_seen(entries)
        self._is_end[seen] = True
        self._level[seen] = np.maximum(self._level[seen], level)
        near = self.last_seen(entries, 1 + NEAR_WINDOWS)
        self._is_near[near] = True
        self._reorder(near, stamp)

    def entries_of(self, pages: Int32 | Int64) -> Int32:
        """The entries, each once, that have some of these pages as window pages."""
        entries = self._entry_of[pages]
        return np.unique(entries[entries > 0])

    def refresh(self, entries: Int32, stamp: int) -> None:
        """Brings the orders up to date after the holders, or the pages, of entries have changed."""
        idle = self._is_alone(self._table[np.ix_(self.windowed, entries)])
        for entry, count in zip(entries.tolist(), idle.sum(axis=0).tolist(), strict=True):
            before = self._idle.get(entry)
            if before is not None and before.num_pages != count:
                self._leave_order(entry)
                before = None
            if count and before is None:
                self._stamp[entry] = stamp
                self._enter_order(entry, count)

    def idle_with(self, pages: Int32) -> int:
        """How many pages are no longer idle once a request holds these."""
        return int(np.count_nonzero(self._is_alone(pages[self._entry_of[pages] > 0])))

    def next_windows(self) -> IdlePages | None:
        """The idle pages to be evicted first: the oldest cold ones, else the oldest warm ones."""
        return self._cold.oldest() or self._warm.oldest()

    def place_of(self, entry: int) -> tuple[RadixNode, int] | None:
        """The node at or above whose end an entry lies, and the entry's place in its sequence, in pages."""
        end = self._ends[entry]
        return None if end is None else (end, int(self._column[entry]))

    def rebuild(self, kept: Int32) -> None:
        """Derives the orders again after a fault, and forgets every entry that is not ``kept`` in the trees."""
        gone: Bool = np.any(self._table > 0, axis=0)
        gone[kept] = False
        self._clear(gone.nonzero()[0].astype(np.int32))
        if self._fresh is not None:
            free = np.ones(self._level.size, np.bool_)
            free[kept], free[0] = False, False
            self._fresh = free.nonzero()[0][::-1].tolist()
        self._entry_of[:] = 0
        for group in self.windowed.tolist():
            self._entry_of[self._table[group, kept]] = kept
        self._entry_of[0] = 0
        self._start_orders()
        for stamp in np.unique(self._stamp[kept]).tolist():  # the oldest first
            self.refresh(kept[self._stamp[kept] == stamp], stamp)

    def pages(self, entries: Int32) -> Int32:
        """All pages of entries, in no promised order; int32 ``[n]``."""
        pages = self.of(entries)
        return pages[pages > 0]

    def check_integrity(self, kept: Int32) -> None:
        """Proves that just the ``kept`` entries have pages, and that the orders hold what is idle.

        Raises:
            IntegrityError: names the first wrong entry.
        """
        has = self._table > 0
        wrong: Bool = np.any(has, axis=0)
        wrong[kept] = False
        full: Bool = np.all(has[np.ix_(self.full, kept)], axis=0)
        wrong[kept[~full]] = True
        ordered: list[IdlePages] = [*self._cold, *self._warm]
        count = sum(each.num_pages for each in ordered)
        self._cold.check_integrity()
        self._warm.check_integrity()
        for each in ordered:
            alone = self._is_alone(self._table[self.windowed, each.entry])
            wrong[each.entry] |= self._idle.get(each.entry) is not each or alone.sum() != each.num_pages
        every = self._table[self.windowed]
        unordered: Bool = np.any(self._is_alone(every), axis=0)
        unordered[[each.entry for each in ordered]] = False
        wrong |= unordered
        for group in self.windowed.tolist():
            mine = has[group].nonzero()[0]
            wrong[mine[self._entry_of[self._table[group, mine]] != mine]] = True
        if wrong.any() or (count, len(ordered)) != (self.idle_pages, len(self._idle)):
            entry = int(wrong.argmax())
            raise IntegrityError(
                f"entry {entry} of the prefix cache has the pages {self._table[:, entry].tolist()}; {count} pages of "
                f"{len(ordered)} entries are idle, {self.idle_pages} of {len(self._idle)} are counted; a bug, report it"
            )
        if self.window_pages != np.count_nonzero(every):
            raise IntegrityError(f"{self.window_pages} window pages are counted, {np.count_nonzero(every)} are there")

    def _is_alone(self, pages: Int32) -> Bool:
        """Which of these pages, 0 where there is none, are held by the cache alone."""
        alone: Bool = self._pool.holders(pages.reshape(-1).astype(np.int64)).reshape(pages.shape) == 1
        return alone & (pages > 0)

    def _clear(self, entries: Int32) -> None:
        """Forgets entries that have left the trees."""
        pages = self._table[np.ix_(self.windowed, entries)]
        self.window_pages -= int(np.count_nonzero(pages))
        self._entry_of[pages[pages > 0]] = 0
        self._table[:, entries] = 0
        self._ends[entries] = NO_NODE
        self._level[entries] = self._stamp[entries] = 0
        self._is_used[entries] = self._is_end[entries] = self._is_near[entries] = False
        if self._fresh is not None:
            self._fresh.extend(entries.tolist())

    def _reorder(self, entries: Int32, stamp: int) -> None:
        """Lets the cold ones of these entries stand where they belong now: a row's window may have left them behind."""
        for entry in entries.tolist():
            idle = self._idle.get(entry)
            if idle is not None and not idle.is_warm:
                self._leave_order(entry)
                self._stamp[entry] = stamp
                self._enter_order(entry, idle.num_pages)

    def _enter_order(self, entry: int, num_pages: int) -> None:
        is_warm = bool(self._is_used[entry] or self._is_end[entry])
        level = int(self._level[entry] if is_warm else self._is_near[entry])
        idle = IdlePages(entry, num_pages, level, int(self._stamp[entry]), is_warm=is_warm)
        (self._warm if is_warm else self._cold).append(idle)
        self._idle[entry] = idle
        self.idle_pages += num_pages

    def _leave_order(self, entry: int) -> None:
        idle = self._idle.pop(entry, None)
        if idle is not None:
            (self._warm if idle.is_warm else self._cold).remove(idle)
            self.idle_pages -= idle.num_pages

    def _lengthen(self, more: int) -> None:
        """Makes room for ``more`` entries whose numbers are no pages."""
        before = self._level.size
        columns = self._columns()
        self._make_columns(before + more)
        for new, old in zip(self._columns(), columns, strict=True):
            new[..., :before] = old
        if self._fresh is not None:
            self._fresh[:0] = range(before + more - 1, before - 1, -1)


def runs_of(pages: Int32) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of entries that have a page, of ``pages[n]`` in which 0 is none."""
    edges = np.flatnonzero(np.diff(pages > 0, prepend=False, append=False))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
