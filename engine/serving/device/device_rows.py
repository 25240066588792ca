"""What the device keeps for each page-table row from step to step, so that only what is new must be sent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from engine.attention.window_table import WindowTable
from engine.serving.device.parcel import LAST_SAMPLED

NULL_PAGE = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceRows:
    """The device's page table and last tokens; it is kept with the pool and donated with it.

    Attributes:
        page_table: int32 ``[R, G, P]``, the host's table of each group of layers as far as it was sent. Behind a
            request's last page, and before a window, are pages that others may have by now; no query reads them.
        last_token: int32 ``[R]``, the token that each row sampled last; ``NOT_A_TOKEN`` where its logits allowed none.
    """

    page_table: jax.Array
    last_token: jax.Array

    @classmethod
    def empty(cls, rows: int, groups: int, pages: int) -> DeviceRows:
        """``rows`` rows of ``pages`` null pages for each of ``groups`` groups, and no tokens."""
        return cls(jnp.zeros((rows, groups, pages), jnp.int32), jnp.zeros(rows, jnp.int32))

    def with_pages(self, places: jax.Array, pages: jax.Array) -> DeviceRows:
        """Enters ``pages[n]`` at ``places[n]`` of the flattened table; a place beyond the table is padding.

        The place of a column is ``(row * G + group) * P + column``.
        """
        flat = self.page_table.reshape(-1).at[places].set(pages, mode="drop")
        return replace(self, page_table=flat.reshape(self.page_table.shape))

    def with_tokens(self, rows: jax.Array, tokens: jax.Array) -> DeviceRows:
        """Enters ``tokens[B]``, which ``rows[B]`` have sampled; a row beyond the table is padding."""
        return replace(self, last_token=self.last_token.at[rows].set(tokens, mode="drop"))

    def pages_of(self, rows: jax.Array, group: int, table: WindowTable, computed: jax.Array) -> jax.Array:
        """The pages of ``rows[B]`` in a group, ``[B, table.columns]``; null pages for a row that is padding.

        The host does not send that a page behind a window has gone, so the null page stands in its place.

        Args:
            rows: int32 ``[B]``.
            group: index of the group.
            table: which columns its layers see.
            computed: int32 ``[B]``, tokens of each row before those of the step.
        """
        first, kept = table.first_column(computed), table.first_kept(computed)
        if first is None:
            pages = self.page_table.at[rows, group].get(mode="fill", fill_value=NULL_PAGE)
            first = jnp.zeros_like(rows)
        else:
            take = partial(lax.dynamic_slice, self.page_table, slice_sizes=(1, 1, table.columns))
            of_rows = jax.vmap(lambda row, column: take((row, jnp.int32(group), column))[0, 0])(rows, first)
            pages = jnp.where((rows < self.page_table.shape[0])[:, None], of_rows, NULL_PAGE)
        if kept is None:
            return pages
        columns = jnp.arange(table.columns, dtype=jnp.int32)
        return jnp.where(columns < (kept - first)[:, None], NULL_PAGE, pages)

    def known_tokens(self, token_ids: jax.Array, rows: jax.Array) -> jax.Array:
        """``token_ids[T]`` with the tokens that only the device knows; ``rows[T]`` is the row of each token.

        A row that was left without a token feeds token 0, and the host drops the result.
        """
        last = jnp.maximum(self.last_token.at[rows].get(mode="clip"), 0)
        return jnp.where(token_ids == LAST_SAMPLED, last, token_ids)
