"""What it takes to give page-table rows more tokens: worked out before anything is taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import ShapeError
from engine.memory.integers import INT32_MAX, Bool, Int32, Int64


@dataclass(frozen=True, eq=False)
class RowGrowth:
    """What it takes to grow page-table rows; its arrays are read-only.

    Attributes:
        rows: ``[B]``.
        lens, ends: ``[B]`` tokens before and afterwards.
        held: ``[B]`` pages before.
        fresh: ``[B]`` pages that the new tokens begin.
    """

    rows: Int64
    lens: Int32
    ends: Int64
    held: Int64
    fresh: Int64

    def __post_init__(self) -> None:
        for array in (self.rows, self.lens, self.ends, self.held, self.fresh):
            array.flags.writeable = False

    @property
    def num_pages(self) -> int:
        """Fresh pages in all."""
        return int(self.fresh.sum())


def check_new_pages(pages: Int64) -> None:
    """Checks pages that are to enter a page table.

    Raises:
        ShapeError: a page is the null page, beyond int32 or listed twice.
    """
    if pages.size and (pages.min() < 1 or pages.max() > INT32_MAX):
        raise ShapeError(f"pages go from {pages.min()} to {pages.max()}; page ids are int32 and the null page is 0")
    if np.unique(pages).size != pages.size:
        raise ShapeError("a new page begins twice in one call; each belongs to one place of one row")


def check_continues(
    table: Int32, page_size: int, rows: Int64, positions: Int64, slots: Int64, pages: Int64, begins: Bool
) -> None:
    """Checks that each slot has its position's offset and, in mid-page, the page of the token before.

    Raises:
        ShapeError: names the first slot that has not.
    """
    before = np.concatenate([pages[:1], pages[:-1]])
    first = np.diff(rows, prepend=-1) != 0
    before[first] = table[rows[first], np.maximum(positions[first] - 1, 0) // page_size]
    right = (begins | (pages == before)) & (slots - pages * page_size == positions % page_size)
    if not right.all():
        at = int(right.argmin())
        raise ShapeError(
            f"slot {slots[at]} cannot hold token {positions[at]} of row {rows[at]} at page_size {page_size}; "
            "it must have that token's offset and, in mid-page, the page of the token before"
        )
