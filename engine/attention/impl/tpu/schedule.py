"""The work of one step as flat integer arrays, made in XLA from the page table and the lengths.

An item is a block of queries of one sequence; a decode row is one item, and a sequence without new tokens makes none.
The arrays depend on the step alone, so that XLA computes them once for all layers.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from engine.attention.impl.tpu.contract.geometry import Geometry
from engine.attention.impl.tpu.contract.step_plan import KINDS, Schedule, plan_parts
from engine.attention.metadata import AttentionMetadata


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
    num_tokens = slots.shape[0]
    # Ids outside the cache name the null page.
    table = jnp.where(page_table.astype(jnp.uint32) < cache_pages, page_table, 0)
    if metadata.by_table:
        slots = jnp.zeros(1, jnp.int32)
    return Schedule(
        *_find_runs(table, geo.run_pages),
        slots=jnp.where(slots < cache_pages * geo.page_size, slots, -1),
        plan=_plan(geo, cu_q_lens, kv_lens, num_tokens, page_table.shape[1] * geo.page_size),
    )


def _plan(geo: Geometry, cu_q_lens: jax.Array, kv_lens: jax.Array, num_tokens: int, row_tokens: int) -> jax.Array:
    """The parts of ``plan_parts`` as one sum over the sequences, of what each contributes to each number.

    Sorts, running sums and searches would be chains of tiny programs, before the first layer of each step.
    """
    batch = geo.plan_rows
    most_items = max(1, num_tokens // geo.tiles[-1].queries + min(batch, num_tokens))
    parts = plan_parts(batch, 2 * (batch + most_items) + 1 + KINDS)
    least = jnp.iinfo(jnp.int32).min
    later, earlier = _pairs(batch + 1, cu_q_lens.shape[0])
    bounds = jnp.where(later >= earlier, jnp.clip(cu_q_lens, 0, num_tokens)[None], least).max(1)
    start, q_lens = bounds[:-1], bounds[1:] - bounds[:-1]
    kv_lens = jnp.pad(kv_lens, (0, batch - kv_lens.shape[0]))
    kind, items, most_queries = _split(geo, q_lens)
    later, earlier = _pairs(batch, batch)
    before = (kind[:, None] < kind[None]) | ((kind[:, None] == kind[None]) & (later < earlier))
    first = jnp.where(before, items[:, None], 0).sum(0, dtype=jnp.int32)
    row = jnp.asarray(np.arange(batch, dtype=np.int32))
    shares = {
        "cu_q_lens": lambda at: jnp.where(row < at, q_lens, 0) + jnp.where(row == 0, start, 0),
        "kv_lens": lambda at: jnp.where(row == at, jnp.clip(kv_lens, 0, row_tokens), 0),
        "counts": lambda at: jnp.where(kind == at, items, 0),
        "item_seq": lambda at: jnp.where((at >= first) & (at - first < items), row, 0),
        "item_token": lambda at: jnp.where(
            (at >= first) & (at - first < items), start + (at - first) * most_queries, 0
        ),
    }
    # Constants of the program: XLA would make what follows from a counted index by a program for each.
    index = np.arange(parts["item_token"].stop, dtype=np.int32)[:, None]
    plan = jnp.zeros((), jnp.int32)
    for name, share in shares.items():
        here = (index >= parts[name].start) & (index < parts[name].stop)
        plan = jnp.where(here, share(index - parts[name].start), plan)
    return plan.sum(1, dtype=jnp.int32)


def _pairs(rows: int, columns: int) -> list[jax.Array]:
    return [jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in (0, 1)]


def _split(geo: Geometry, q_lens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each sequence the kind of its items, their number, and the most queries that one has."""
    kind, items = jnp.zeros_like(q_lens), q_lens  # a decode row is one item
    most_queries = jnp.ones_like(q_lens)
    for number, (smaller, tile) in enumerate(itertools.pairwise(geo.tiles), 1):
        larger = q_lens > smaller.queries
        kind = jnp.where(larger, number, kind)
        items = jnp.where(larger, jax.lax.div(q_lens + (tile.queries - 1), tile.queries), items)
        most_queries = jnp.where(larger, tile.queries, most_queries)
    return kind, items, most_queries


def _find_runs(table: jax.Array, run_pages: int) -> tuple[jax.Array, jax.Array]:
    """Pads the table to whole groups of pages, and tells whether each group is contiguous; both flat."""
    if run_pages == 1:
        return table.reshape(-1), jnp.ones(1, jnp.int32)
    table = jnp.pad(table, [(0, 0), (0, -table.shape[1] % run_pages)])
    groups = table.reshape(table.shape[0], -1, run_pages)
    runs = (groups[:, :, 1:] - groups[:, :, :-1] == 1).astype(jnp.int32).min(-1)
    return table.reshape(-1), runs.reshape(-1)
