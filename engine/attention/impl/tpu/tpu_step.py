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
from engine.attention.impl.tpu.contract.geometry import Geometry
from engine.attention.impl.tpu.contract.scratch import fresh_shapes, scratch_shapes
from engine.attention.impl.tpu.contract.step_plan import Schedule
from engine.attention.impl.tpu.kernel.flash import LOG2_E
from engine.attention.impl.tpu.kernel.pallas_call import call_kernel
from engine.attention.impl.tpu.schedule import make_schedule
from engine.attention.metadata import AttentionMetadata, is_live
from engine.attention.options import AttentionOptions, HeadArrays
from engine.errors import BackendUnsupported
from engine.kv.layout import LANES, SUBLANES, merge_kv, packing, pad_fused, padded_rows, to_stored
from engine.kv.tpu_view import unview_words, view_is_free, view_words

FRESH_ROWS = 4096  # new K (and V) rows that are merged at once: 1 MiB of bfloat16
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
    batch, columns = metadata.page_table.shape
    geo = make_geometry(
        q, k.shape[1], fused_kv, options, (batch, columns), generation=generation, blocks=blocks,
        has_scales=not (heads.k_scale is None and heads.v_scale is None), interpret=bool(interpret),
    )  # fmt: skip
    schedule = make_schedule(geo, metadata, cache_pages=fused_kv.shape[0] // geo.page_size)
    _check_scalars(schedule, page_size=geo.page_size, table=(batch, columns))
    rows = geo.q_words // geo.folds * geo.io_pack
    queries = view_words(pad_fused(heads.scale_queries(q).astype(geo.io_dtype), rows, geo.lanes))
    if geo.fresh_tokens:
        fresh = tuple(half.reshape(-1, geo.pack, LANES) for half in (k, v))
    else:
        k, v = (to_stored(half, geo.kv_dtype) for half in heads.scale_kv(k, v))
        fresh = (view_words(pad_fused(merge_kv(k, v), *fused_kv.shape[1:])),)
    sinks = None if heads.sinks is None else _sink_rows(geo, heads.sinks)
    pages = view_words(fused_kv).reshape(-1, geo.page_size, geo.words, geo.pack, LANES)
    with jax.enable_x64(False):  # the kernel counts in 32 bits, whatever the program around it does
        out, *lse, cache = call_kernel(
            geo,
            schedule,
            queries,
            fresh,
            sinks,
            pages,
            vmem_limit_bytes=vmem_limit(generation, scratch_bytes(geo)),
            interpret=interpret,
        )
    out = unview_words(out, rows, geo.lanes)[:, : q.shape[1], : q.shape[2]]
    out = heads.unscale(out).astype(q.dtype)
    buffer = unview_words(cache.reshape(fused_kv.shape[0], *cache.shape[2:]), *fused_kv.shape[1:])
    if not options.return_lse:
        return AttentionResult(out, buffer)
    by_word = lse[0][..., 0, 0].reshape(geo.heads, geo.group_words, -1, geo.io_pack)
    live = is_live(metadata.cu_q_lens, num_tokens=q.shape[0], xp=jnp)[:, None]
    return AttentionResult(out, buffer, jnp.where(live, jnp.moveaxis(by_word, 2, 0).reshape(q.shape[:2]), -jnp.inf))


def make_geometry(
    q: jax.ShapeDtypeStruct | jax.Array,
    kv_heads: int,
    fused_kv: jax.ShapeDtypeStruct | jax.Array,
    options: AttentionOptions,
    table: tuple[int, int],
    *,
    generation: str,
    blocks: BlockSizes | None = None,
    has_scales: bool = False,
    interpret: bool = False,
) -> Geometry:
    """The static sizes of a call; arguments as in ``ragged_paged_attention_tpu``; only their shapes are read.

    The page table has the shape ``table``; K and V have q's dtype; ``has_scales`` tells whether they are divided by a
    scale before they are written.

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
        longest=table[1] * options.page_size,
        window=options.sliding_window,
    )
    # No item has more queries than the step.
    most_queries = -(-q.shape[0] // SUBLANES) * SUBLANES
    chosen = dataclasses.replace(chosen, prefill_queries=min(chosen.prefill_queries, most_queries))
    io_dtype = jnp.dtype(jnp.float32 if wide or group % 2 else jnp.bfloat16)
    merges = kv_dtype == q.dtype and not has_scales
    pages_in_run = run_pages(options.page_size, chosen)
    geo = Geometry(
        heads=kv_heads,
        group=group,
        lanes=lanes,
        words=rows // packing(kv_dtype) * lanes // LANES,
        page_size=options.page_size,
        run_pages=pages_in_run,
        table_pages=-(-table[1] // pages_in_run) * pages_in_run,
        # XLA makes a program of each operation on arrays of one number.
        plan_rows=max(table[0], SUBLANES),
        kv_dtype=kv_dtype,
        compute_dtype=jnp.dtype(jnp.float32 if wide else jnp.bfloat16),
        io_dtype=io_dtype,
        q_words=padded_rows(-(-q.shape[1] // 2), io_dtype) // packing(io_dtype) * lanes // LANES,
        q_scale=options.sm_scale * LOG2_E if options.soft_cap is None else options.sm_scale / options.soft_cap,
        fresh_tokens=_fresh_tokens(q, kv_heads, fused_kv) if merges else 0,
        soft_cap=options.soft_cap,
        window=options.sliding_window,
        has_lse=options.return_lse,
        tiles=make_tiles(chosen, group, options.page_size),
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


def _fresh_tokens(q: jax.ShapeDtypeStruct | jax.Array, heads: int, fused_kv: jax.ShapeDtypeStruct | jax.Array) -> int:
    """How many new tokens the kernel merges at once; 0 where words of k and of v are not those of the cache's rows."""
    tokens, _, head_dim = q.shape
    rows = fused_kv.shape[1]
    if packing(fused_kv.dtype) != 2 or head_dim != LANES or rows != 2 * heads or tokens * heads % 2:
        return 0
    return min(max(FRESH_ROWS // heads, 2 * SUBLANES), -(-tokens // (2 * SUBLANES)) * 2 * SUBLANES)


def scratch_bytes(geo: Geometry) -> int:
    """Bytes of VMEM that the kernel's buffers take."""
    scopes: list[Any] = [jax.tree.leaves(scratch_shapes(geo)), fresh_shapes(geo)[0][:2]]
    sizes = [[math.prod(buffer.shape) * jnp.dtype(buffer.dtype).itemsize for buffer in scope] for scope in scopes]
    return max(map(sum, sizes))


def _fit_queries(geo: Geometry, blocks: BlockSizes, generation: str) -> Geometry:
    """Halves the queries of a block while the buffers leave the compiler too little memory.

    ``choose_blocks`` does not know all buffers: the log-sum-exp, for one, takes a third more per row of q.
    """
    smallest = max(SUBLANES, SHORT_ROWS // geo.group)
    while scratch_bytes(geo) > VMEM_BYTES[generation] * VMEM_SHARE and blocks.prefill_queries >= 2 * smallest:
        halved = blocks.prefill_queries // 2 // SUBLANES * SUBLANES
        blocks = dataclasses.replace(blocks, prefill_queries=halved)
        geo = dataclasses.replace(geo, tiles=make_tiles(blocks, geo.group, geo.page_size))
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


def _sink_rows(geo: Geometry, sinks: jax.Array) -> jax.Array:
    """Sinks in the log2 domain, those of a word of q repeated to 8 rows: ``[H, G / p, 8, 128]`` float32."""
    logits = sinks.astype(jnp.float32).reshape(geo.heads, geo.group_words, geo.io_pack) * LOG2_E
    tiled = jnp.tile(logits, (1, 1, SUBLANES // geo.io_pack))
    return jnp.broadcast_to(tiled[..., None], (*tiled.shape, LANES))
