"""Ragged paged attention on TPU: lays a step out for the kernel, calls it, and gathers its results."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from engine.attention.impl.implementation import AttentionResult
from engine.attention.impl.tpu.block_sizes import (
    SHORT_ROWS,
    SMEM_BYTES,
    VMEM_BYTES,
    VMEM_SHARE,
    BlockSizes,
    choose_blocks,
    make_tiles,
    run_pages,
    vmem_limit,
)
from engine.attention.impl.tpu.kernel.flash import LOG2_E
from engine.attention.impl.tpu.kernel.geometry import Geometry
from engine.attention.impl.tpu.kernel.items import Schedule
from engine.attention.impl.tpu.kernel.pallas_call import call_kernel, scratch_shapes
from engine.attention.impl.tpu.schedule import make_schedule
from engine.attention.metadata import AttentionMetadata, is_live
from engine.attention.options import AttentionOptions, HeadArrays
from engine.errors import BackendUnsupported
from engine.kv.layout import LANES, SUBLANES, merge_kv, packing, pad_fused, to_stored
from engine.kv.tpu_view import unview_words, view_is_free, view_words

KV_DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "float8_e5m2")


def ragged_paged_attention_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: jax.Array,
    metadata: AttentionMetadata,
    heads: HeadArrays,
    options: AttentionOptions,
    *,
    generation: str,
    blocks: BlockSizes | None = None,
    interpret: Any = False,
) -> AttentionResult:
    """Writes the new K and V into their pages, then attends causally, in one kernel.

    Arguments and results are those of an ``Implementation`` that fuses the write. The new tokens of one sequence that
    share a page must go to consecutive slots by ``out_cache_loc``, or all be -1. The algorithm is FlashAttention-2 over
    the paged, interleaved cache of tpu_commons' kernel v3.

    Args:
        q: ``[T, Hq, D]`` bfloat16 or float32.
        k: ``[T, H, D]`` new keys.
        v: as ``k``.
        fused_kv: ``[S, 2H', D']``, donated for a write in place; D' a multiple of 128 and 2H' whole words, as a pool
            laid out for a TPU stores them; bfloat16, float32 or an 8-bit float.
        metadata: the sequences of the step.
        heads: sinks and scales.
        options: the layer's options.
        generation: the target, "v5e", "v6e" or "v7x".
        blocks: block sizes; None takes the formula's.
        interpret: False, or ``pltpu.InterpretParams`` to run on a CPU.

    Raises:
        BackendUnsupported: the storage has a dtype or padding that this kernel cannot take, or the step is too large
            for scalar memory or the smallest blocks for VMEM.
    """
    geo = make_geometry(
        q, k.shape[1], fused_kv, options, metadata.page_table.shape[1], generation=generation, blocks=blocks,
        interpret=bool(interpret),
    )  # fmt: skip
    schedule = make_schedule(geo, metadata, cache_pages=fused_kv.shape[0] // geo.page_size)
    _check_scalars(schedule, page_size=geo.page_size, table=metadata.page_table.shape)
    queries = _queries_by_head(geo, heads.scale_queries(q.astype(jnp.float32)), options.sm_scale)
    k, v = (to_stored(half, geo.kv_dtype) for half in heads.scale_kv(k, v))
    new = view_words(pad_fused(merge_kv(k, v), *fused_kv.shape[1:]))
    sinks = None if heads.sinks is None else _sink_rows(geo, heads.sinks)
    pages = view_words(fused_kv).reshape(-1, geo.page_size, geo.words, geo.pack, LANES)
    with jax.enable_x64(False):  # the kernel counts in 32 bits, whatever the program around it does
        out, *lse, cache = call_kernel(
            geo, schedule, queries, new, sinks, pages, vmem_limit_bytes=vmem_limit(generation), interpret=interpret
        )
    live = is_live(schedule.cu_q_lens, num_tokens=q.shape[0], xp=jnp)[:, None, None]
    by_head = out.reshape(geo.heads, -1, geo.group, geo.lanes)[..., : q.shape[2]]
    out = heads.unscale(jnp.where(live, by_head.swapaxes(0, 1).reshape(q.shape), 0)).astype(q.dtype)
    buffer = unview_words(cache.reshape(fused_kv.shape[0], *cache.shape[2:]), *fused_kv.shape[1:])
    if not options.return_lse:
        return AttentionResult(out, buffer)
    by_token = lse[0][..., 0, 0].swapaxes(0, 1).reshape(q.shape[:2])
    return AttentionResult(out, buffer, jnp.where(live[:, 0], by_token, -jnp.inf))


def make_geometry(
    q: jax.ShapeDtypeStruct | jax.Array,
    kv_heads: int,
    fused_kv: jax.ShapeDtypeStruct | jax.Array,
    options: AttentionOptions,
    table_pages: int,
    *,
    generation: str,
    blocks: BlockSizes | None = None,
    interpret: bool = False,
) -> Geometry:
    """The static sizes of a call; arguments as in ``ragged_paged_attention_tpu``; only their shapes are read.

    Raises:
        BackendUnsupported: the storage has a dtype or padding that the kernel cannot take, or VMEM cannot hold the
            smallest blocks.
    """
    _check(kv_heads, fused_kv, options.page_size)
    rows, lanes = fused_kv.shape[1:]
    kv_dtype, group = fused_kv.dtype, q.shape[1] // kv_heads
    wide = q.dtype == jnp.float32 or kv_dtype == jnp.float32
    chosen = blocks or choose_blocks(
        generation=generation,
        heads=kv_heads,
        group=group,
        lanes=lanes,
        dtype=kv_dtype.name,
        page_size=options.page_size,
        longest=table_pages * options.page_size,
        window=options.sliding_window,
    )
    # No item has more queries than the step.
    most_queries = -(-q.shape[0] // SUBLANES) * SUBLANES
    chosen = dataclasses.replace(chosen, prefill_queries=min(chosen.prefill_queries, most_queries))
    pages_in_run = run_pages(options.page_size, chosen)
    geo = Geometry(
        heads=kv_heads,
        group=group,
        lanes=lanes,
        words=rows // packing(kv_dtype) * lanes // LANES,
        page_size=options.page_size,
        run_pages=pages_in_run,
        table_pages=-(-table_pages // pages_in_run) * pages_in_run,
        kv_dtype=kv_dtype,
        compute_dtype=jnp.dtype(jnp.float32 if wide else jnp.bfloat16),
        io_dtype=jnp.dtype(jnp.float32 if wide or group % 2 else jnp.bfloat16),
        soft_cap=options.soft_cap,
        window=options.sliding_window,
        has_lse=options.return_lse,
        tiles=make_tiles(chosen, group),
        interpret=interpret,
    )
    if blocks is None:
        geo = _fit_queries(geo, chosen, generation)
    _check_vmem(geo, generation)
    return geo


def _check(heads: int, fused_kv: jax.ShapeDtypeStruct | jax.Array, page_size: int) -> None:
    rows, lanes = fused_kv.shape[1:]
    if fused_kv.dtype.name not in KV_DTYPES:
        raise BackendUnsupported(f"the TPU kernel reads caches of {', '.join(KV_DTYPES)}, not {fused_kv.dtype}")
    if not view_is_free(rows, lanes, fused_kv.dtype):
        raise BackendUnsupported(
            f"the TPU kernel needs slots of whole words and lanes that it can view without a copy: {heads} KV heads in "
            f"[{rows}, {lanes}] of {fused_kv.dtype} are not; make the pool with platform='tpu', and for an 8-bit cache "
            "of more than 8 heads over 128 wide shard the heads"
        )
    if page_size % packing(fused_kv.dtype):
        raise BackendUnsupported(
            f"page_size={page_size} is not a multiple of the packing {packing(fused_kv.dtype)} of {fused_kv.dtype}; "
            "choose one that is"
        )


def scratch_bytes(geo: Geometry) -> int:
    """Bytes of VMEM that the kernel's buffers take."""
    buffers = jax.tree.leaves(scratch_shapes(geo))
    return sum(math.prod(buffer.shape) * jnp.dtype(buffer.dtype).itemsize for buffer in buffers)


def _fit_queries(geo: Geometry, blocks: BlockSizes, generation: str) -> Geometry:
    """Halves the queries of a block while the buffers leave the compiler too little memory.

    ``choose_blocks`` does not know all buffers: the log-sum-exp, for one, takes a third more per row of q.
    """
    smallest = max(SUBLANES, SHORT_ROWS // geo.group)
    while scratch_bytes(geo) > VMEM_BYTES[generation] * VMEM_SHARE and blocks.prefill_queries >= 2 * smallest:
        halved = blocks.prefill_queries // 2 // SUBLANES * SUBLANES
        blocks = dataclasses.replace(blocks, prefill_queries=halved)
        geo = dataclasses.replace(geo, tiles=make_tiles(blocks, geo.group))
    return geo


def _check_vmem(geo: Geometry, generation: str) -> None:
    """Refuses blocks that the compiler could not place: it would fail after the choice of implementation."""
    needed = scratch_bytes(geo)
    if needed > vmem_limit(generation):
        raise BackendUnsupported(
            f"the TPU kernel's blocks for {geo.heads} KV heads of {geo.lanes} in {geo.kv_dtype}, page_size="
            f"{geo.page_size}, take {needed:,} bytes of VMEM of {vmem_limit(generation):,} on {generation}; use pages "
            f"whose size divides {LANES} or is a multiple of it, or shard the heads"
        )


def _check_scalars(schedule: Schedule, *, page_size: int, table: tuple[int, ...]) -> None:
    """Refuses a step whose description the compiler could not place in scalar memory."""
    needed = sum(4 * array.size for array in schedule)
    if needed > SMEM_BYTES:
        raise BackendUnsupported(
            f"the TPU kernel keeps a page table and lengths in scalar memory: {table[0]} sequences of {table[1]} "
            f"pages of {page_size} tokens need {needed:,} bytes of {SMEM_BYTES:,}; use larger pages, a shorter context "
            "or fewer sequences per step"
        )


def _queries_by_head(geo: Geometry, q: jax.Array, sm_scale: float) -> jax.Array:
    """``[T, Hq, D]`` float32 to ``[H, T, G / p, p, D']``, times every factor on the logits: the kernel has none."""
    scale = sm_scale * LOG2_E if geo.soft_cap is None else sm_scale / geo.soft_cap
    padded = jnp.pad(q * scale, [(0, 0), (0, 0), (0, geo.lanes - q.shape[2])]).astype(geo.io_dtype)
    grouped = padded.reshape(q.shape[0], geo.heads, geo.group // geo.io_pack, geo.io_pack, geo.lanes)
    return grouped.swapaxes(0, 1)


def _sink_rows(geo: Geometry, sinks: jax.Array) -> jax.Array:
    """Sinks in the log2 domain, repeated to rows that fill whole groups and sublanes: ``[H, R, 128]`` float32."""
    logits = sinks.astype(jnp.float32).reshape(geo.heads, geo.group) * LOG2_E
    tiled = jnp.tile(logits, (1, math.lcm(geo.group, SUBLANES) // geo.group))
    return jnp.broadcast_to(tiled[..., None], (*tiled.shape, LANES))
