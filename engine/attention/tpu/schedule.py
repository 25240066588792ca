"""The work of one step as flat integer arrays, made in XLA from the page table and the lengths.

A decode item is a sequence with one new token; a prefill item is a block of queries of a sequence with more. Sequences
with none make no item. These arrays depend on the step alone, so that XLA computes them once for all layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Schedule(NamedTuple):
    """Scalar-prefetched into SMEM; every leaf is int32.

    Attributes:
        table: ``[B * P']`` page ids.
        runs: ``[B * P' / run_pages]``, 1 where the pages of a group are contiguous; ``[1]`` where a group is a page.
        cu_q_lens: ``[B + 1]``.
        kv_lens: ``[B]``.
        slots: ``[T]`` where each new token goes, -1 for nowhere.
        counts: ``[2]``, decode and prefill items.
        decode_seq: ``[B]`` sequence of each decode item.
        item_seq: ``[N]`` sequence of each prefill item.
        item_token: ``[N]`` index of its first query among the step's tokens.
        item_position: ``[N]`` position of its first query in the sequence.
        item_queries: ``[N]`` queries in it, at most the block size.
    """

    table: jax.Array
    runs: jax.Array
    cu_q_lens: jax.Array
    kv_lens: jax.Array
    slots: jax.Array
    counts: jax.Array
    decode_seq: jax.Array
    item_seq: jax.Array
    item_token: jax.Array
    item_position: jax.Array
    item_queries: jax.Array


def make_schedule(
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    slots: jax.Array,
    *,
    prefill_queries: int,
    run_pages: int,
) -> Schedule:
    """Flattens one step into decode and prefill items.

    Args:
        page_table: ``[B, P]`` int32 page ids.
        cu_q_lens: ``[B + 1]`` int32.
        kv_lens: ``[B]`` int32, new tokens included.
        slots: ``[T]`` int32, where each new token goes, -1 for nowhere.
        prefill_queries: query tokens of one prefill item.
        run_pages: pages that one DMA may move.

    Returns:
        The schedule; N is the most prefill items that T tokens of B sequences can make.
    """
    batch = page_table.shape[0]
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    decode = q_lens == 1
    # A stable sort by "is not decode" puts the decode sequences first, in order.
    decode_seq = jnp.argsort(~decode, stable=True).astype(jnp.int32)
    blocks = jnp.where(q_lens > 1, -(-q_lens // prefill_queries), 0)
    ends = jnp.cumsum(blocks)
    num_tokens = slots.shape[0]
    most = num_tokens // prefill_queries + max(1, min(batch, num_tokens // 2))
    index = jnp.arange(most, dtype=jnp.int32)
    seq = jnp.minimum(jnp.searchsorted(ends, index, side="right"), batch - 1).astype(jnp.int32)
    skipped = (index - (ends[seq] - blocks[seq])) * prefill_queries
    table, runs = _find_runs(page_table, run_pages)
    return Schedule(
        table=table,
        runs=runs,
        cu_q_lens=cu_q_lens,
        kv_lens=kv_lens,
        slots=slots,
        counts=jnp.stack([decode.sum(), ends[-1]]).astype(jnp.int32),
        decode_seq=decode_seq,
        item_seq=seq,
        item_token=(cu_q_lens[seq] + skipped).astype(jnp.int32),
        item_position=(kv_lens[seq] - q_lens[seq] + skipped).astype(jnp.int32),
        item_queries=jnp.minimum(q_lens[seq] - skipped, prefill_queries).astype(jnp.int32),
    )


def _find_runs(page_table: jax.Array, run_pages: int) -> tuple[jax.Array, jax.Array]:
    """Pads the table to whole groups, and says of each whether its pages are contiguous; both flat."""
    batch, pages = page_table.shape
    if run_pages == 1:
        return page_table.reshape(-1), jnp.ones(1, jnp.int32)
    table = jnp.pad(page_table, [(0, 0), (0, -pages % run_pages)])
    groups = table.reshape(batch, -1, run_pages)
    runs = (groups[:, :, 1:] - groups[:, :, :-1] == 1).all(-1)
    return table.reshape(-1), runs.reshape(-1).astype(jnp.int32)
