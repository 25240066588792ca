"""Page-table rows that all grow by one token a step: checked once, so that a step costs a few array operations."""

from __future__ import annotations

import numpy as np

from engine.errors import ShapeError
from engine.memory.integers import Int32, Int64, read_only


class DecodingRows:
    """Rows of a page table that decode together, as ``ReqToTokenPool.decoding_rows`` makes them.

    They may grow in no other way meanwhile: then ``check_unchanged`` refuses them, and others are to be made.

    Args:
        rows: ``[B]`` distinct rows in use.
        table: int32 ``[max_requests, max_pages]`` of the page table, shared with it.
        kv_lens: int32 ``[max_requests]``, likewise.
        taken: int64 ``[max_requests]``, likewise: the pages of each row that the device was told of.
        releases: int64 ``[max_requests]``, likewise: how often each row was given back.
        page_size: tokens a page.
        max_context_tokens: most tokens of a row.

    Attributes:
        steps_left: how often they can grow until one of them is full.
    """

    def __init__(
        self,
        rows: Int64,
        table: Int32,
        kv_lens: Int32,
        taken: Int64,
        releases: Int64,
        page_size: int,
        max_context_tokens: int,
    ) -> None:
        self._rows = rows
        self._places = table.reshape(-1)
        self._first_places = rows * table.shape[1]
        self._kv_lens = kv_lens
        self._taken = taken
        self._releases, self._releases_then = releases, releases[rows]
        self._page_size = page_size
        self._lens = read_only(kv_lens[rows])
        self.steps_left = max_context_tokens - int(self._lens.max(initial=0))
        self._untaken: list[tuple[Int64, Int32, Int32]] = []  # rows that began pages, their places, those pages

    @property
    def lens(self) -> Int32:
        """Tokens of each row, int32 ``[B]``, read-only."""
        return self._lens

    def beginning(self) -> Int64:
        """Which of the rows begin a page with their next token: indices, int64 ``[n]``."""
        indices: Int64 = (self._lens % self._page_size == 0).nonzero()[0]
        return indices

    def check_unchanged(self) -> None:
        """Raises ShapeError where a row is full or has changed other than by ``grow``."""
        if self.steps_left < 1:
            raise ShapeError("one of the rows that decode together holds max_context_tokens; stop its request")
        rows = self._rows
        if (self._kv_lens[rows] != self._lens).any() or (self._releases[rows] != self._releases_then).any():
            raise ShapeError("rows that decode together have changed in another way; take them together anew")

    def grow(self, beginning: Int64, pages: Int32) -> None:
        """Every row grows by a token.

        Args:
            beginning: from ``beginning``; ``check_unchanged`` accepts the rows.
            pages: their pages, int32 ``[n]``, held by nobody else.
        """
        before = lens, steps_left, untaken = self._lens, self.steps_left, self._untaken
        longer = read_only(lens + np.int32(1))  # a fresh array: who has the old one may keep it
        places = None
        if beginning.size:
            places = (self._first_places[beginning] + lens[beginning] // self._page_size).astype(np.int32)
            untaken = [*untaken, (self._rows[beginning], places, pages.copy())]
        try:
            if places is not None:
                self._places[places] = pages
            self._kv_lens[self._rows] = longer
            self._lens, self.steps_left, self._untaken = longer, steps_left - 1, untaken
        except BaseException:
            self._lens, self.steps_left, self._untaken = before
            self._kv_lens[self._rows] = lens
            if places is not None:
                self._places[places] = 0
            raise

    def take_new_pages(self) -> tuple[Int32, Int32]:
        """Places and pages that no call has returned before, as ``ReqToTokenPool.take_new_pages`` of these rows."""
        untaken = self._untaken
        if not untaken:
            return np.empty(0, np.int32), np.empty(0, np.int32)
        rows, places, pages = untaken[0]
        if len(untaken) > 1:
            rows, places, pages = (np.concatenate(parts) for parts in zip(*untaken, strict=True))
        before = self._taken[rows]
        try:
            np.add.at(self._taken, rows, 1)
            self._untaken = []
            return places, pages
        except BaseException:
            self._taken[rows] = before
            self._untaken = untaken
            raise
