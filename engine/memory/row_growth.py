"""What it takes to give page-table rows more tokens: worked out before anything is taken."""

from __future__ import annotations

from dataclasses import dataclass

from engine.memory.integers import Int32, Int64


@dataclass(frozen=True, eq=False)
class RowGrowth:
    """What it takes to grow page-table rows.

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

    @property
    def num_pages(self) -> int:
        """Fresh pages in all."""
        return int(self.fresh.sum())
