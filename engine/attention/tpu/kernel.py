"""Ragged paged flash attention over the fused cache: the kernel body and its call.

One launch does a step of one layer: it writes the new rows into their pages, then walks the items, one kind after the
other. Pages stream from HBM through two buffers; the next block, be it of the next item, is fetched while this one is
computed. The online softmax is that of FlashAttention-2, the cache layout that of tpu_commons' kernel v3.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.attention.tpu import flash, registers, transfer
from engine.attention.tpu.geometry import LANES, SUBLANES, Geometry, Tile
from engine.attention.tpu.registers import Ref
from engine.attention.tpu.schedule import Schedule
from engine.attention.tpu.transfer import Item, Scalar


class Operands(NamedTuple):
    """HBM refs, but for the sinks in VMEM; all as in ``call_kernel``."""

    q: Ref
    new: Ref
    sinks: Ref | None
    out: Ref
    lse: Ref | None
    cache: Ref


class Scratch(NamedTuple):
    """VMEM, two buffers of each but the softmax state; every kind of item takes a part of it.

    Attributes:
        pages: ``[2, fetch_pages, page_size, stride, p, 128]``.
        q: ``[2, H, queries, G / p, p, D']``.
        out: as ``q``.
        lse: ``[2, H, queries, G, 1, 128]``, or as good as nothing.
        state: softmax state.
    """

    pages: Any
    q: Any
    out: Any
    lse: Any
    state: flash.State


class Semaphores(NamedTuple):
    """DMA semaphores: two a stream, one a buffer."""

    pages: Any
    q: Any
    out: Any
    write: Any


class Lane(NamedTuple):
    """What the walk over the items of one kind works with; ``first`` and ``count`` say which items they are."""

    geo: Geometry
    tile: Tile
    schedule: Schedule
    ops: Operands
    scratch: Scratch
    sems: Semaphores
    first: Scalar
    count: Scalar

    def item(self, index: Scalar) -> Item:
        """The ``index``-th item of this kind."""
        return transfer.make_item(self.geo, self.schedule, self.first + index, self.tile.queries)

    def q_copy(self, item: Item, buffer: Scalar) -> tuple[Ref, Ref]:
        """Source and target of the queries' DMA."""
        source = self.ops.q.at[:, pl.ds(item.token, item.queries)]
        return source, self.scratch.q.at[buffer, :, pl.ds(0, item.queries)]

    def out_copies(self, item: Item, buffer: Scalar) -> list[tuple[Ref, Ref]]:
        """Sources and targets of the results' DMAs."""
        pairs = [(self.scratch.out, self.ops.out), (self.scratch.lse, self.ops.lse)]
        return [
            (source.at[buffer, :, pl.ds(0, item.queries)], target.at[:, pl.ds(item.token, item.queries)])
            for source, target in pairs
            if target is not None
        ]


def _run_lane(lane: Lane) -> None:
    """Walks all items of one kind; the buffers' turns run on across blocks and items."""
    sems, scratch, fetch_pages = lane.sems, lane.scratch, lane.tile.fetch_pages

    def start_block(item: Item, block: Scalar, slot: Scalar) -> None:
        pages, sem = scratch.pages.at[slot], sems.pages.at[slot]
        transfer.start_block(lane.geo, lane.schedule, lane.ops.cache, pages, sem, item, block, fetch_pages)

    def first_block(item: Item) -> Scalar:
        return transfer.block_range(lane.geo, item, fetch_pages)[0]

    def run_item(index: Scalar, slot: Scalar) -> Scalar:
        item, buffer, more = lane.item(index), index % 2, index + 1 < lane.count
        following = lane.item(jnp.minimum(index + 1, lane.count - 1))
        first, last = transfer.block_range(lane.geo, item, fetch_pages)

        @pl.when(more)
        def _() -> None:
            transfer.start_copy(*lane.q_copy(following, 1 - buffer), sems.q.at[1 - buffer])

        transfer.wait_in(*lane.q_copy(item, buffer), sems.q.at[buffer])
        flash.reset(scratch.state, lane.tile.rows, lane.ops.sinks)

        def run_block(block: Scalar, slot: Scalar) -> Scalar:
            stays = block + 1 < last
            ahead = Item(*(jnp.where(stays, here, there) for here, there in zip(item, following, strict=True)))

            @pl.when(stays | more)
            def _() -> None:
                start_block(ahead, jnp.where(stays, block + 1, first_block(following)), 1 - slot)

            transfer.wait_block(lane.geo, scratch.pages.at[slot], sems.pages.at[slot], item, block, fetch_pages)
            _attend_block(lane, item, block, slot, buffer)
            return 1 - slot

        slot = jax.lax.fori_loop(first, last, run_block, slot)

        @pl.when(index >= 2)
        def _() -> None:
            _wait_results(lane, index - 2)

        _finish(lane, item, buffer)
        return slot

    @pl.when(lane.count > 0)
    def _() -> None:
        item = lane.item(0)
        start_block(item, first_block(item), 0)
        transfer.start_copy(*lane.q_copy(item, 0), sems.q.at[0])
        jax.lax.fori_loop(0, lane.count, run_item, 0)
        left = jnp.maximum(lane.count - 2, 0)
        jax.lax.fori_loop(left, lane.count, lambda index, _: _wait_results(lane, index), None)


def _attend_block(lane: Lane, item: Item, block: Scalar, slot: Scalar, buffer: Scalar) -> None:
    """Computes the chunks of a fetched block: those that every query sees whole without a mask, then the edges."""
    geo, tile = lane.geo, lane.tile
    chunk = tile.chunk_pages * geo.page_size
    base = block * tile.fetch_pages * geo.page_size
    end = jnp.minimum(item.high, base + tile.fetch_pages * geo.page_size)
    first, last = jnp.maximum(item.low - base, 0) // chunk, pl.cdiv(end - base, chunk)
    # Whole for all: not after the first query, and not before the window of the last.
    whole_low = item.low * 0 if geo.window is None else item.position + item.queries - geo.window
    whole_first = jnp.clip(pl.cdiv(jnp.maximum(whole_low - base, 0), chunk), first, last)
    whole_last = jnp.clip((item.position + 1 - base) // chunk, whole_first, last)

    def attend(index: Scalar, edge: bool) -> None:
        pages = lane.scratch.pages.at[slot, pl.ds(index * tile.chunk_pages, tile.chunk_pages)]
        flash.attend(
            geo, tile, pages, lane.scratch.q.at[buffer], lane.scratch.state, item, base + index * chunk, edge=edge
        )

    jax.lax.fori_loop(whole_first, whole_last, lambda index, _: attend(index, edge=False), None)

    def attend_edge(index: Scalar, _: None) -> None:
        attend(jnp.where(index < whole_first, index, index + whole_last - whole_first), edge=True)

    jax.lax.fori_loop(first, last - (whole_last - whole_first), attend_edge, None)


def _finish(lane: Lane, item: Item, buffer: Scalar) -> None:
    """Starts the results of an item on their way."""
    scratch = lane.scratch

    def one_head(head: Scalar, _: None) -> None:
        rows, lse = flash.result(scratch.state, head, lane.tile.rows)
        registers.store_rows(lane.geo, scratch.out.at[buffer, head], rows)
        if lane.geo.has_lse:
            registers.store_rows(lane.geo, scratch.lse.at[buffer, head], lse)

    jax.lax.fori_loop(0, lane.geo.heads, one_head, None)
    for source, target in lane.out_copies(item, buffer):
        transfer.start_copy(source, target, lane.sems.out.at[buffer])


def _wait_results(lane: Lane, index: Scalar) -> None:
    for source, target in lane.out_copies(lane.item(index), index % 2):
        transfer.wait_out(source, target, lane.sems.out.at[index % 2])


def scratch_shapes(geo: Geometry) -> Scratch:
    """VMEM scratch of the kernel."""
    rows, fetch_pages = (max(tile[at] for tile in geo.tiles) for at in (1, 2))
    queries = -(-rows // geo.group)
    q = pltpu.VMEM((2, geo.heads, queries, geo.group // geo.io_pack, geo.io_pack, geo.lanes), geo.io_dtype)
    lse = (2, geo.heads, queries, geo.group, 1, LANES) if geo.has_lse else (SUBLANES, LANES)
    return Scratch(
        pages=pltpu.VMEM((2, fetch_pages, geo.page_size, geo.stride, geo.pack, LANES), geo.kv_dtype),
        q=q,
        out=q,
        lse=pltpu.VMEM(lse, jnp.float32),
        state=flash.State(*(pltpu.VMEM((geo.heads, rows, width), jnp.float32) for width in (LANES, LANES, geo.lanes))),
    )


def scratch_bytes(geo: Geometry) -> int:
    """Bytes of the kernel's scratch."""
    buffers = jax.tree.leaves(scratch_shapes(geo))
    return sum(math.prod(buffer.shape) * jnp.dtype(buffer.dtype).itemsize for buffer in buffers)


def call_kernel(
    geo: Geometry,
    schedule: Schedule,
    q: jax.Array,
    new: jax.Array,
    sinks: jax.Array | None,
    cache: jax.Array,
    *,
    vmem_limit_bytes: int,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Runs one step of one layer.

    Args:
        geo: static sizes.
        schedule: the step's items.
        q: ``[H, T, G / p, p, D']`` of the io dtype, scaled into the log2 domain.
        new: ``[T, words, p, 128]`` of the cache's dtype, the merged new rows.
        sinks: ``[H, rows, 128]`` float32 in the log2 domain for the most rows of an item, or None.
        cache: ``[pages, page_size, words, p, 128]``, aliased to the last result.
        vmem_limit_bytes: VMEM that the compiler may use.
        interpret: False, or ``pltpu.InterpretParams``.

    Returns:
        out shaped as ``q``, with lse ``[H, T, G, 1, 128]`` float32, then the cache; tokens of no item hold anything.
    """
    scalars, has_sinks = len(schedule), sinks is not None
    lse_shape = [jax.ShapeDtypeStruct((*q.shape[:2], geo.group, 1, LANES), jnp.float32)] * geo.has_lse
    out_shape = [
        jax.ShapeDtypeStruct(q.shape, q.dtype), *lse_shape, jax.ShapeDtypeStruct(cache.shape, cache.dtype)
    ]  # fmt: skip
    shapes, pair = scratch_shapes(geo), pltpu.SemaphoreType.DMA((2,))
    hbm, vmem = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.VMEM)

    def body(*refs: Any) -> None:
        left = list(refs)
        steps = Schedule(*(left.pop(0) for _ in range(scalars)))
        q_ref, new_ref, _ = (left.pop(0) for _ in range(3))
        sinks_ref = left.pop(0) if has_sinks else None
        out_ref, lse_ref = left.pop(0), left.pop(0) if geo.has_lse else None
        ops = Operands(q_ref, new_ref, sinks_ref, out_ref, lse_ref, left.pop(0))
        scratch, sems = left
        transfer.write_new_rows(geo, steps, ops.new, ops.cache, sems.write)
        first = steps.counts[0] * 0
        for kind, tile in enumerate(geo.tiles):
            lane = Lane(geo, tile, steps, ops, scratch, sems, first, steps.counts[kind])
            _run_lane(lane)
            first += lane.count

    call = pl.pallas_call(
        body,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars,
            grid=(1,),
            in_specs=[hbm] * 3 + [vmem] * has_sinks,
            out_specs=[hbm] * len(out_shape),
            scratch_shapes=[shapes, Semaphores(pair, pair, pair, pltpu.SemaphoreType.DMA)],
        ),
        input_output_aliases={scalars + 2: len(out_shape) - 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit_bytes, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="ragged_paged_attention",
    )
    return tuple(call(*schedule, q, new, cache, *([sinks] if has_sinks else [])))
