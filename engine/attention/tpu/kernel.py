"""Ragged paged flash attention over the fused cache: the kernel body and its call.

One launch does a step of one layer: it writes the new rows into their pages, then walks the decode items and then the
prefill items. Pages stream from HBM through two buffers; the next block, be it of the next item, is fetched while this
one is computed. The online softmax is that of FlashAttention-2, the cache layout that of tpu_commons' kernel v3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.attention.tpu import flash, registers, transfer
from engine.attention.tpu.geometry import LANES, Geometry
from engine.attention.tpu.registers import Ref
from engine.attention.tpu.schedule import Schedule
from engine.attention.tpu.transfer import Item, Scalar


class Lane(NamedTuple):
    """What one kind of item, decode or prefill, works with.

    Attributes:
        pages: ``[2, fetch_pages, page_size, stride, p, 128]``, the two page buffers.
        q: two buffers of queries.
        out: two buffers of results.
        lse: two buffers of log-sum-exp, or None.
        state: softmax state.
        sinks: ``[H, rows, 128]`` float32 in VMEM, or None.
        fetch_pages: pages of one fetch block.
        chunk_pages: pages of one compute chunk.
        count: items of this kind.
        item: index to the item.
        q_copy: (index, buffer) to the (source, target) of the queries' DMA.
        out_copies: (index, buffer) to the (source, target) pairs of the results' DMAs.
        attend: (pages, buffer, item, start, edge) computes one chunk.
        finish: (buffer) writes the results of an item into its buffers.
    """

    pages: Ref
    state: flash.State
    sinks: Ref | None
    fetch_pages: int
    chunk_pages: int
    count: Scalar
    item: Callable[[Scalar], Item]
    q_copy: Callable[[Scalar, Scalar], tuple[Ref, Ref]]
    out_copies: Callable[[Scalar, Scalar], list[tuple[Ref, Ref]]]
    attend: Callable[..., None]
    finish: Callable[[Scalar], None]


class Semaphores(NamedTuple):
    """DMA semaphores: two a stream, one a buffer."""

    pages: Ref
    q: Ref
    out: Ref
    write: Ref


def _attend_block(geo: Geometry, lane: Lane, item: Item, block: Scalar, slot: Scalar, buffer: Scalar) -> None:
    """Computes the chunks of a fetched block: those that every query sees whole without a mask, then the edges."""
    chunk = lane.chunk_pages * geo.page_size
    base = block * lane.fetch_pages * geo.page_size
    end = jnp.minimum(item.high, base + lane.fetch_pages * geo.page_size)
    first, last = jnp.maximum(item.low - base, 0) // chunk, pl.cdiv(end - base, chunk)
    # Whole for all: not after the first query, and not before the window of the last.
    whole_low = item.low * 0 if geo.window is None else item.position + item.queries - geo.window
    whole_first = jnp.clip(pl.cdiv(jnp.maximum(whole_low - base, 0), chunk), first, last)
    whole_last = jnp.clip((item.position + 1 - base) // chunk, whole_first, last)

    def attend(index: Scalar, edge: bool) -> None:
        pages = lane.pages.at[slot, pl.ds(index * lane.chunk_pages, lane.chunk_pages)]
        lane.attend(pages, buffer, item, base + index * chunk, edge=edge)

    jax.lax.fori_loop(whole_first, whole_last, lambda index, _: attend(index, edge=False), None)

    def attend_edge(index: Scalar, _: None) -> None:
        attend(jnp.where(index < whole_first, index, index + whole_last - whole_first), edge=True)

    jax.lax.fori_loop(first, last - (whole_last - whole_first), attend_edge, None)


def _run_lane(geo: Geometry, schedule: Any, cache: Ref, sems: Semaphores, lane: Lane) -> None:
    """Walks all items of one kind; the buffers' turns run on across blocks and items."""

    def start_block(item: Item, block: Scalar, slot: Scalar) -> None:
        transfer.start_block(
            geo, schedule, cache, lane.pages.at[slot], sems.pages.at[slot], item, block, lane.fetch_pages
        )

    def first_block(item: Item) -> Scalar:
        return transfer.block_range(geo, item, lane.fetch_pages)[0]

    def run_item(index: Scalar, slot: Scalar) -> Scalar:
        item, buffer = lane.item(index), index % 2
        following = lane.item(jnp.minimum(index + 1, lane.count - 1))
        first, last = transfer.block_range(geo, item, lane.fetch_pages)

        @pl.when(index + 1 < lane.count)
        def _() -> None:
            transfer.start_copy(*lane.q_copy(index + 1, 1 - buffer), sems.q.at[1 - buffer])

        transfer.wait_in(*lane.q_copy(index, buffer), sems.q.at[buffer])
        flash.reset(lane.state, lane.sinks)

        def run_block(block: Scalar, slot: Scalar) -> Scalar:
            stays = block + 1 < last
            ahead = Item(*(jnp.where(stays, here, there) for here, there in zip(item, following, strict=True)))

            @pl.when(stays | (index + 1 < lane.count))
            def _() -> None:
                start_block(ahead, jnp.where(stays, block + 1, first_block(following)), 1 - slot)

            transfer.wait_block(geo, lane.pages.at[slot], sems.pages.at[slot], item, block, lane.fetch_pages)
            _attend_block(geo, lane, item, block, slot, buffer)
            return 1 - slot

        slot = jax.lax.fori_loop(first, last, run_block, slot)

        @pl.when(index >= 2)
        def _() -> None:
            _wait_results(lane, sems, index - 2)

        lane.finish(buffer)
        for source, target in lane.out_copies(index, buffer):
            transfer.start_copy(source, target, sems.out.at[buffer])
        return slot

    @pl.when(lane.count > 0)
    def _() -> None:
        start_block(lane.item(0), first_block(lane.item(0)), 0)
        transfer.start_copy(*lane.q_copy(0, 0), sems.q.at[0])
        jax.lax.fori_loop(0, lane.count, run_item, 0)
        jax.lax.fori_loop(
            jnp.maximum(lane.count - 2, 0), lane.count, lambda index, _: _wait_results(lane, sems, index), None
        )


def _wait_results(lane: Lane, sems: Semaphores, index: Scalar) -> None:
    for source, target in lane.out_copies(index, index % 2):
        transfer.wait_out(source, target, sems.out.at[index % 2])


class Operands(NamedTuple):
    """HBM refs, but for the sinks in VMEM; ``decode_*`` and ``prefill_*`` as in ``call_kernel``."""

    decode_q: Ref
    prefill_q: Ref
    new: Ref
    sinks: tuple[Ref, Ref] | None
    decode_out: Ref
    prefill_out: Ref
    decode_lse: Ref | None
    prefill_lse: Ref | None
    cache: Ref


class Scratch(NamedTuple):
    """VMEM of one kind of item."""

    pages: Any
    q: Any
    out: Any
    lse: Any
    peak: Any
    total: Any
    acc: Any


def _decode_lane(geo: Geometry, schedule: Any, ops: Operands, scratch: Scratch) -> Lane:
    state = flash.State(scratch.peak, scratch.total, scratch.acc)

    def item(index: Scalar) -> Item:
        seq = schedule.decode_seq[index]
        return transfer.make_item(geo, seq, schedule.kv_lens[seq] - 1, 1)

    def out_copies(index: Scalar, buffer: Scalar) -> list[tuple[Ref, Ref]]:
        seq = schedule.decode_seq[index]
        copies = [(scratch.out.at[buffer], ops.decode_out.at[seq])]
        return copies if ops.decode_lse is None else [*copies, (scratch.lse.at[buffer], ops.decode_lse.at[seq])]

    def finish(buffer: Scalar) -> None:
        for head in range(geo.heads):
            rows, lse = flash.result(state, head)
            scratch.out[buffer, head] = rows.astype(scratch.out.dtype)
            if geo.has_lse:
                scratch.lse[buffer, head] = lse

    return Lane(
        pages=scratch.pages,
        state=state,
        sinks=None if ops.sinks is None else ops.sinks[0],
        fetch_pages=geo.blocks.decode_fetch_pages,
        chunk_pages=geo.blocks.decode_chunk_pages,
        count=schedule.counts[0],
        item=item,
        q_copy=lambda index, buffer: (ops.decode_q.at[schedule.decode_seq[index]], scratch.q.at[buffer]),
        out_copies=out_copies,
        attend=lambda pages, buffer, item, start, edge: flash.attend_decode(
            geo, pages, scratch.q.at[buffer], state, item, start, edge=edge
        ),
        finish=finish,
    )


def _prefill_lane(geo: Geometry, schedule: Any, ops: Operands, scratch: Scratch) -> Lane:
    state = flash.State(scratch.peak, scratch.total, scratch.acc)
    size = geo.blocks.prefill_queries

    def item(index: Scalar) -> Item:
        return transfer.make_item(
            geo, schedule.item_seq[index], schedule.item_position[index], schedule.item_queries[index]
        )

    def q_copy(index: Scalar, buffer: Scalar) -> tuple[Ref, Ref]:
        return ops.prefill_q.at[:, pl.ds(schedule.item_token[index], size)], scratch.q.at[buffer]

    def out_copies(index: Scalar, buffer: Scalar) -> list[tuple[Ref, Ref]]:
        token, count = schedule.item_token[index], schedule.item_queries[index]
        pairs = [(scratch.out, ops.prefill_out), (scratch.lse, ops.prefill_lse)]
        return [
            (source.at[buffer, :, pl.ds(0, count)], target.at[:, pl.ds(token, count)])
            for source, target in pairs
            if target is not None
        ]

    def finish(buffer: Scalar) -> None:
        def one_head(head: Scalar, _: None) -> None:
            rows, lse = flash.result(state, head)
            registers.store_rows(geo, scratch.out.at[buffer, head], rows)
            if geo.has_lse:
                scratch.lse[buffer, head] = lse.reshape(size, geo.group, LANES)

        jax.lax.fori_loop(0, geo.heads, one_head, None)

    def attend(pages: Ref, buffer: Scalar, item: Item, start: Scalar, *, edge: bool) -> None:
        flash.attend_prefill(
            geo,
            pages,
            lambda head: registers.load_queries(geo, scratch.q.at[buffer, head]),
            state,
            item,
            start,
            edge=edge,
        )

    return Lane(
        pages=scratch.pages,
        state=state,
        sinks=None if ops.sinks is None else ops.sinks[1],
        fetch_pages=geo.blocks.prefill_fetch_pages,
        chunk_pages=geo.blocks.prefill_chunk_pages,
        count=schedule.counts[1],
        item=item,
        q_copy=q_copy,
        out_copies=out_copies,
        attend=attend,
        finish=finish,
    )


def _scratch(geo: Geometry, rows: int, fetch_pages: int, q: tuple[int, ...], q_dtype: Any, out_dtype: Any) -> Scratch:
    state = (geo.heads, rows)
    lse = (2, *q[:2], geo.group, LANES) if len(q) > 3 else (2, *q[:2], LANES)
    return Scratch(
        pages=pltpu.VMEM((2, fetch_pages, geo.page_size, geo.stride, geo.pack, LANES), geo.kv_dtype),
        q=pltpu.VMEM((2, *q), q_dtype),
        out=pltpu.VMEM((2, *q), out_dtype),
        lse=pltpu.VMEM(lse if geo.has_lse else (1, 1, LANES), jnp.float32),
        peak=pltpu.VMEM((*state, LANES), jnp.float32),
        total=pltpu.VMEM((*state, LANES), jnp.float32),
        acc=pltpu.VMEM((*state, geo.lanes), jnp.float32),
    )


def scratch_shapes(geo: Geometry) -> tuple[Scratch, Scratch]:
    """VMEM scratch of the decode and of the prefill items."""
    blocks = geo.blocks
    decode_q = (geo.heads, geo.decode_rows, geo.lanes)
    prefill_q = (geo.heads, blocks.prefill_queries, geo.group // geo.io_pack, geo.io_pack, geo.lanes)
    compute = geo.compute_dtype
    return (
        _scratch(geo, geo.decode_rows, blocks.decode_fetch_pages, decode_q, compute, geo.io_dtype),
        _scratch(geo, geo.prefill_rows, blocks.prefill_fetch_pages, prefill_q, geo.io_dtype, geo.io_dtype),
    )


def call_kernel(
    geo: Geometry,
    schedule: Schedule,
    decode_q: jax.Array,
    prefill_q: jax.Array,
    new: jax.Array,
    sinks: tuple[jax.Array, jax.Array] | None,
    cache: jax.Array,
    *,
    vmem_limit_bytes: int,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Runs one step of one layer.

    Args:
        geo: static sizes.
        schedule: the step's items.
        decode_q: ``[B, H, decode_rows, D']`` of the compute dtype, scaled into the log2 domain.
        prefill_q: ``[H, T + prefill_queries, G / p, p, D']`` of the io dtype, scaled alike.
        new: ``[T, words, p, 128]`` of the cache's dtype, the merged new rows.
        sinks: ``[H, decode_rows, 128]`` and ``[H, prefill_rows, 128]`` float32 in the log2 domain, or None.
        cache: ``[pages, page_size, words, p, 128]``, aliased to the last result.
        vmem_limit_bytes: VMEM that the compiler may use.
        interpret: False, or ``pltpu.InterpretParams``.

    Returns:
        decode out ``[B, H, decode_rows, D']``, prefill out shaped as ``prefill_q``, then with lse
        ``[B, H, decode_rows, 128]`` and ``[H, T + prefill_queries, G, 128]`` float32, then the cache.
    """
    lse_shapes = (
        (
            jax.ShapeDtypeStruct((*decode_q.shape[:3], LANES), jnp.float32),
            jax.ShapeDtypeStruct((*prefill_q.shape[:2], geo.group, LANES), jnp.float32),
        )
        if geo.has_lse
        else ()
    )
    out_shape = (
        jax.ShapeDtypeStruct(decode_q.shape, geo.io_dtype),
        jax.ShapeDtypeStruct(prefill_q.shape, geo.io_dtype),
        *lse_shapes,
        jax.ShapeDtypeStruct(cache.shape, cache.dtype),
    )
    sink_operands = () if sinks is None else sinks
    hbm, vmem = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.VMEM)
    scalars = len(schedule)
    inputs = 4 + len(sink_operands)

    def body(*refs: Any) -> None:
        steps = Schedule(*refs[:scalars])
        q_refs, cache_in = refs[scalars : scalars + 3], scalars + 3
        sink_refs = refs[cache_in + 1 : scalars + inputs] or None
        outs, rest = refs[scalars + inputs :][: len(out_shape)], refs[scalars + inputs + len(out_shape) :]
        lse_refs = outs[2:4] if geo.has_lse else (None, None)
        ops = Operands(q_refs[0], q_refs[1], q_refs[2], sink_refs, outs[0], outs[1], lse_refs[0], lse_refs[1], outs[-1])
        decode_scratch, prefill_scratch, sems = Scratch(*rest[:7]), Scratch(*rest[7:14]), Semaphores(*rest[14:])
        transfer.write_new_rows(geo, steps, ops.new, ops.cache, sems.write)
        _run_lane(geo, steps, ops.cache, sems, _decode_lane(geo, steps, ops, decode_scratch))
        _run_lane(geo, steps, ops.cache, sems, _prefill_lane(geo, steps, ops, prefill_scratch))

    decode_scratch, prefill_scratch = scratch_shapes(geo)
    pair = pltpu.SemaphoreType.DMA((2,))
    return tuple(
        pl.pallas_call(
            body,
            out_shape=out_shape,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=scalars,
                grid=(1,),
                in_specs=[hbm] * 4 + [vmem] * len(sink_operands),
                out_specs=[hbm] * len(out_shape),
                scratch_shapes=[*decode_scratch, *prefill_scratch, pair, pair, pair, pltpu.SemaphoreType.DMA],
            ),
            input_output_aliases={scalars + 3: len(out_shape) - 1},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit_bytes, disable_bounds_checks=True
            ),
            interpret=interpret,
            name="ragged_paged_attention",
        )(*schedule, decode_q, prefill_q, new, cache, *sink_operands)
    )
