"""What the device keeps for each page-table row from step to step, so that only what is new must be sent."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

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

    def pages_of(self, rows: jax.Array, group: int, first_kept: jax.Array | None = None) -> jax.Array:
        """The pages of ``rows[B]`` in a group, ``[B, P]``; null pages for a row that is padding.

        Args:
            rows: int32 ``[B]``.
            group: index of the group.
            first_kept: int32 ``[B]``, the first column of each row that a query of the step can see: the host does not
                send that a page before it has gone, so the null page stands in its place. None keeps all.
        """
        pages = self.page_table.at[rows, group].get(mode="fill", fill_value=NULL_PAGE)
        if first_kept is None:
            return pages
        return jnp.where(jnp.arange(pages.shape[1], dtype=jnp.int32) < first_kept[:, None], NULL_PAGE, pages)

    def known_tokens(self, token_ids: jax.Array, rows: jax.Array) -> jax.Array:
        """``token_ids[T]`` with the tokens that only the device knows; ``rows[T]`` is the row of each token.

        A row that was left without a token feeds token 0, and the host drops the result.
        """
        last = jnp.maximum(self.last_token.at[rows].get(mode="clip"), 0)
        return jnp.where(token_ids == LAST_SAMPLED, last, token_ids)
