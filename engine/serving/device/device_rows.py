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
        page_table: int32 ``[R, P]``, the host's table as far as it was sent. Behind a request's last page are pages of
            earlier requests of the row, which are never read unmasked.
        last_token: int32 ``[R]``, the token that each row sampled last; ``NOT_A_TOKEN`` where its logits allowed none.
    """

    page_table: jax.Array
    last_token: jax.Array

    @classmethod
    def empty(cls, rows: int, pages: int) -> DeviceRows:
        """``rows`` rows of ``pages`` null pages, and no tokens."""
        return cls(jnp.zeros((rows, pages), jnp.int32), jnp.zeros(rows, jnp.int32))

    def with_pages(self, places: jax.Array, pages: jax.Array) -> DeviceRows:
        """Enters ``pages[n]`` at ``places[n]`` of the flattened table; a place beyond the table is padding."""
        flat = self.page_table.reshape(-1).at[places].set(pages, mode="drop")
        return replace(self, page_table=flat.reshape(self.page_table.shape))

    def with_tokens(self, rows: jax.Array, tokens: jax.Array) -> DeviceRows:
        """Enters ``tokens[B]``, which ``rows[B]`` have sampled; a row beyond the table is padding."""
        return replace(self, last_token=self.last_token.at[rows].set(tokens, mode="drop"))

    def pages_of(self, rows: jax.Array) -> jax.Array:
        """The pages of ``rows[B]``, ``[B, P]``; null pages for a row that is padding."""
        return self.page_table.at[rows].get(mode="fill", fill_value=NULL_PAGE)

    def known_tokens(self, token_ids: jax.Array, rows: jax.Array) -> jax.Array:
        """``token_ids[T]`` with the tokens that only the device knows; ``rows[T]`` is the row of each token.

        A row that was left without a token feeds token 0, and the host drops the result.
        """
        last = jnp.maximum(self.last_token.at[rows].get(mode="clip"), 0)
        return jnp.where(token_ids == LAST_SAMPLED, last, token_ids)
