"""Which pages the prefix cache holds: each once, and each with a reference in the allocator."""

from __future__ import annotations

import numpy as np

from engine.errors import IntegrityError, ShapeError
from engine.memory.integers import Bool, Int32, Int64
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator


class CachedPages:
    """The set of cached pages, with the references that the cache has of them.

    Args:
        allocator: counts the references.
    """

    def __init__(self, allocator: PagedTokenToKVPoolAllocator) -> None:
        self._allocator = allocator
        self._ledger = allocator.ledger
        self._is_cached: Bool = np.zeros(allocator.num_pages + 2, np.bool_)  # the last entry for what is no page

    def holds(self, pages: Int64) -> Bool:
        """Which of some pages are cached; bool ``[n]``; raises ShapeError where one is outside of the pool."""
        self._allocator.ref_count(pages)
        return self._is_cached[pages]

    def add(self, pages: Int64) -> None:
        """Takes a reference of pages that are to be cached.

        Raises:
            ShapeError: a page is cached already, is listed twice, or is held by nobody.
        """
        # What is no page of the pool clips to an entry that is never set, and is refused by the allocator.
        cached = self._is_cached.take(pages, mode="clip")
        if cached.any():
            raise ShapeError(
                f"cannot cache page {pages[cached.argmax()]}: it is cached already, as other tokens or in another "
                "scope; insert a page under the tokens that it was computed from"
            )
        listed = pages.tolist()
        if len(set(listed)) != len(listed):
            twice = next(page for at, page in enumerate(listed) if page in listed[:at])
            raise ShapeError(f"cannot cache page {twice}: it is listed twice, a page holds the tokens of one place")
        is_retained = False
        try:
            # In one statement, so that no fault falls between the call and what is known of it.
            is_retained = self._ledger.retain(pages, are_distinct=True) is None  # type: ignore[func-returns-value]
            self._is_cached[pages] = True
        except BaseException:
            if is_retained:
                self._is_cached[pages] = False
                self._ledger.release(pages)
            raise

    def remove(self, runs: list[Int32]) -> None:
        """Gives back the references of pages that were cached."""
        if runs:
            pages = runs[0] if len(runs) == 1 else np.concatenate(runs)
            is_released = False
            try:
                is_released = self._ledger.release(pages) is None  # type: ignore[func-returns-value]
                # An index of one page as a number costs a fifth of one as an array.
                self._is_cached[pages.item() if pages.size == 1 else pages] = False
            except BaseException:
                if is_released:
                    self._is_cached[pages] = False
                raise

    def keep_only(self, pages: Int32) -> None:
        """Gives back the references of all but ``pages``, as after a fault."""
        is_kept = np.zeros_like(self._is_cached)
        is_kept[pages] = True
        lost = (self._is_cached & ~is_kept).nonzero()[0].astype(np.int32)
        if lost.size:
            self.remove([lost])

    def check_integrity(self, runs: list[Int32]) -> None:
        """Proves that ``runs`` are just the cached pages, each listed once and held in a sound allocator.

        Raises:
            IntegrityError: names the first wrong page.
        """
        self._allocator.check_integrity()
        times = np.bincount(np.concatenate([np.empty(0, np.int32), *runs]), minlength=self._is_cached.size)
        held = self._allocator.ref_count(np.arange(times.size - 1)) > 0
        wrong = times != self._is_cached
        wrong[:-1] |= (times[:-1] > 0) & ~held
        if wrong.any():
            page = int(wrong.argmax())
            raise IntegrityError(
                f"page {page} is {times[page]} times in the prefix trees, {'' if self._is_cached[page] else 'not '}"
                f"marked as cached and {'' if held[page] else 'not '}held in the allocator; a cached page is in the "
                "trees once, marked and held; this is a bug, report it"
            )
