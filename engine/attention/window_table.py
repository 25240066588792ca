"""The part of a page table that layers with a window see in one step, so that a step costs what its window does."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

# Implementations take a context block by block. Where a row's part begins with a block its sums have the same order.
BLOCK_TOKENS = 256
ALIGNED_TOKENS = 1024


@dataclass(frozen=True)
class WindowTable:
    """Which columns of a page table the layers of a group see; static.

    Attributes:
        window: tokens that a query sees, itself included; None is all before it.
        page_size: tokens per page.
        table_pages: columns of the page table.
        columns: columns of each row that are enough for its queries, wherever they stand.
        align: a row's columns begin at a multiple of so many pages.
    """

    window: int | None
    page_size: int
    table_pages: int
    columns: int
    align: int

    @classmethod
    def of(cls, window: int | None, page_size: int, table_pages: int, *, step_tokens: int, devices: int) -> WindowTable:
        """The columns for steps of ``step_tokens`` new tokens; ``devices`` share the tokens of each page."""
        if window is None:
            return cls(window, page_size, table_pages, table_pages, 1)
        block = max(1, BLOCK_TOKENS * devices // page_size)
        align = block * max(1, ALIGNED_TOKENS * devices // (block * page_size))
        needed = -(-(window - 1 + step_tokens) // page_size) + align
        # The last part of a row must begin at such a multiple, too.
        columns = needed + (table_pages - needed) % align
        return cls(window, page_size, table_pages, min(columns, table_pages), align)

    def first_kept(self, computed: jax.Array) -> jax.Array | None:
        """The first column that a token after the first ``computed[B]`` can see; None where it is the first of all.

        The rule is ``engine.layer_groups.first_kept_page``.
        """
        return None if self.window is None else jnp.maximum(computed - self.window + 1, 0) // self.page_size

    def first_column(self, computed: jax.Array) -> jax.Array | None:
        """The first of each row's columns, ``[B]``; None where the rows are whole."""
        kept = self.first_kept(computed)
        if kept is None or self.columns == self.table_pages:
            return None
        return jnp.minimum(kept // self.align * self.align, self.table_pages - self.columns)
