"""The work of one step as flat integer arrays, made in XLA from the page table and the lengths.

An item is a block of queries of one sequence; a decode row is one item, and a sequence without new tokens makes none.
The arrays depend on the step alone, so that XLA computes them once for all layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from engine.attention.impl.tpu.kernel.geometry import Geometry
from engine.attention.impl.tpu.kernel.items import Schedule
from engine.attention.metadata import AttentionMetadata, running_sum


def make_schedule(geo: Geometry, metadata: AttentionMetadata, *, cache_pages: int) -> Schedule:
    """Flattens one step into items.

    Values outside their range are cut off here, once per step, so that no DMA leaves the arrays whatever a traced step
    holds: pages and slots outside the cache, lengths beyond the page table, tokens past the last.

    Args:
        geo: the kernel's sizes.
        metadata: the sequences of the step.
        cache_pages: pages of the cache, the null page included.

    Returns:
        The schedule; N is the most items that T tokens of B sequences can make.
    """
    page_table, cu_q_lens, kv_lens, slots = (
        jnp.asarray(array, jnp.int32)
        for array in (metadata.page_table, metadata.cu_q_lens, metadata.kv_lens, metadata.out_cache_loc)
    )
    batch, pages = page_table.shape
    num_tokens = slots.shape[0]
    cu_q_lens = running_sum(jnp.clip(cu_q_lens, 0, num_tokens))
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    most_queries = jnp.array([tile.queries for tile in geo.tiles], jnp.int32)
    # Every pair is compared: a binary search is a loop of tiny programs, before the first layer of each step.
    kind = jnp.searchsorted(most_queries[:-1], q_lens, method="compare_all").astype(jnp.int32)
    items = jnp.where(q_lens > 0, -(-q_lens // most_queries[kind]), 0)
    # A stable sort puts the sequences of one kind together, in order.
    order = jnp.argsort(kind, stable=True).astype(jnp.int32)
    ends = jnp.cumsum(items[order])
    index = jnp.arange(max(1, num_tokens // geo.tiles[-1].queries + min(batch, num_tokens)), dtype=jnp.int32)
    place = jnp.minimum(jnp.searchsorted(ends, index, side="right", method="compare_all"), batch - 1)
    seq = order[place]
    skipped = (index - (ends[place] - items[seq])) * most_queries[kind[seq]]
    table, runs = _find_runs(jnp.clip(page_table, 0, cache_pages - 1), geo.run_pages)
    return Schedule(
        table=table,
        runs=runs,
        cu_q_lens=cu_q_lens,
        kv_lens=jnp.clip(kv_lens, 0, pages * geo.page_size),
        slots=jnp.where(slots < cache_pages * geo.page_size, slots, -1),
        counts=jnp.where(kind == jnp.arange(len(geo.tiles))[:, None], items, 0).sum(1).astype(jnp.int32),
        item_seq=seq,
        item_token=(cu_q_lens[seq] + skipped).astype(jnp.int32),
    )


def _find_runs(page_table: jax.Array, run_pages: int) -> tuple[jax.Array, jax.Array]:
    """Pads the table to whole groups of pages, and tells whether each group is contiguous; both flat."""
    batch, pages = page_table.shape
    if run_pages == 1:
        return page_table.reshape(-1), jnp.ones(1, jnp.int32)
    table = jnp.pad(page_table, [(0, 0), (0, -pages % run_pages)])
    groups = table.reshape(batch, -1, run_pages)
    runs = (groups[:, :, 1:] - groups[:, :, :-1] == 1).all(-1)
    return table.reshape(-1), runs.reshape(-1).astype(jnp.int32)
