"""Ragged paged attention on TPU: lays a step out for the kernel, calls it, and puts its results together."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from engine.attention.metadata import AttentionMetadata
from engine.attention.spec import AttentionSpec, HeadArrays
from engine.attention.tpu.block_sizes import SMEM_BYTES, choose_blocks, run_pages, vmem_limit
from engine.attention.tpu.flash import LOG2_E
from engine.attention.tpu.geometry import LANES, BlockSizes, Geometry
from engine.attention.tpu.kernel import call_kernel, scratch_shapes
from engine.attention.tpu.schedule import Schedule, make_schedule
from engine.errors import BackendUnsupported
from engine.kv.layout import merge_kv, packing, pad_fused, to_stored
from engine.kv.tpu_view import unview_words, view_is_free, view_words

KV_DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "float8_e5m2")


def ragged_paged_attention_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: jax.Array,
    metadata: AttentionMetadata,
    heads: HeadArrays,
    spec: AttentionSpec,
    *,
    generation: str,
    blocks: BlockSizes | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Writes the new K and V into their pages, then attends causally, in one kernel.

    Arguments and results are those of ``engine.ragged_paged_attention``, already checked; new tokens of one sequence
    that share a page must go to consecutive slots of ``out_cache_loc``, or none of them anywhere. The algorithm is
    FlashAttention-2 over the paged, interleaved cache of tpu_commons' kernel v3.

    Args:
        q: ``[T, Hq, D]`` bfloat16 or float32.
        k: ``[T, H, D]`` new keys.
        v: as ``k``.
        fused_kv: ``[S, 2H', D']``, donated for a write in place; D' a multiple of 128 and 2H' whole words, as a pool
            laid out for a TPU stores them; bfloat16, float32 or an 8-bit float.
        metadata: the step's.
        heads: sinks and scales.
        spec: the layer's options.
        generation: the target, "v5e", "v6e" or "v7x".
        blocks: block sizes; None takes the formula's.
        interpret: False, or ``pltpu.InterpretParams`` to run on a CPU.

    Returns:
        ``out [T, Hq, D]`` in q's dtype, the buffer, and where the spec wants it the log-sum-exp ``[T, Hq]`` float32.

    Raises:
        BackendUnsupported: the storage has a dtype or padding that this kernel cannot take, or the step is too large
            for scalar memory or the smallest blocks for VMEM.
    """
    tokens, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    table, cu_q_lens, kv_lens, slots_new = (
        jnp.asarray(array, jnp.int32)
        for array in (metadata.page_table, metadata.cu_q_lens, metadata.kv_lens, metadata.out_cache_loc)
    )
    geo = make_geometry(
        q, kv_heads, fused_kv, spec, table.shape[1], generation=generation, blocks=blocks, interpret=bool(interpret)
    )
    schedule = make_schedule(
        table,
        cu_q_lens,
        kv_lens,
        slots_new,
        prefill_queries=geo.blocks.prefill_queries,
        run_pages=geo.run_pages,
    )
    _, k, v = heads.scale(q, k, v)
    _check_scalars(schedule, page_size=spec.page_size, table=table.shape)
    grouped = _scaled_queries(geo, q, spec.sm_scale, heads.k_scale)
    *results, cache = call_kernel(
        geo,
        schedule,
        _decode_queries(geo, grouped, cu_q_lens),
        _prefill_queries(geo, grouped),
        view_words(pad_fused(merge_kv(*(to_stored(half, geo.kv_dtype) for half in (k, v))), *fused_kv.shape[1:])),
        None if heads.sinks is None else _sink_rows(geo, heads.sinks),
        view_words(fused_kv).reshape(-1, geo.page_size, geo.words, geo.pack, LANES),
        vmem_limit_bytes=vmem_limit(generation),
        interpret=interpret,
    )
    is_decode, live, seq = _token_kinds(cu_q_lens, tokens)
    decode_out = results[0][seq][:, :, : geo.group, :head_dim]
    prefill_out = results[1].reshape(kv_heads, -1, geo.group, geo.lanes)[:, :tokens, :, :head_dim].swapaxes(0, 1)
    out = jnp.where(is_decode[:, None, None, None], decode_out, prefill_out)
    out = heads.unscale(jnp.where(live[:, None, None, None], out, 0).reshape(q.shape)).astype(q.dtype)
    buffer = unview_words(cache.reshape(fused_kv.shape[0], *cache.shape[2:]), *fused_kv.shape[1:])
    if not spec.return_lse:
        return out, buffer
    lse = jnp.where(
        is_decode[:, None, None], results[2][seq][:, :, : geo.group, 0], results[3][:, :tokens, :, 0].swapaxes(0, 1)
    )
    return out, buffer, jnp.where(live[:, None, None], lse, -jnp.inf).reshape(tokens, q_heads)


def make_geometry(
    q: jax.ShapeDtypeStruct | jax.Array,
    kv_heads: int,
    fused_kv: jax.ShapeDtypeStruct | jax.Array,
    spec: AttentionSpec,
    table_pages: int,
    *,
    generation: str,
    blocks: BlockSizes | None = None,
    interpret: bool = False,
) -> Geometry:
    """The static sizes of a call; arguments as in ``ragged_paged_attention_tpu``, of which only shapes are read.

    Raises:
        BackendUnsupported: the storage has a dtype or padding that the kernel cannot take, or VMEM cannot hold the
            smallest blocks.
    """
    _check(kv_heads, fused_kv, spec.page_size)
    rows, lanes = fused_kv.shape[1:]
    kv_dtype, group = fused_kv.dtype, q.shape[1] // kv_heads
    wide = q.dtype == jnp.float32 or kv_dtype == jnp.float32
    blocks = blocks or choose_blocks(
        generation=generation,
        heads=kv_heads,
        group=group,
        lanes=lanes,
        dtype=kv_dtype.name,
        page_size=spec.page_size,
        longest=table_pages * spec.page_size,
    )
    pages_in_run = run_pages(spec.page_size, blocks)
    geo = Geometry(
        heads=kv_heads,
        group=group,
        lanes=lanes,
        words=rows // packing(kv_dtype) * lanes // LANES,
        page_size=spec.page_size,
        run_pages=pages_in_run,
        table_pages=-(-table_pages // pages_in_run) * pages_in_run,
        kv_dtype=kv_dtype,
        compute_dtype=jnp.dtype(jnp.float32 if wide else jnp.bfloat16),
        io_dtype=jnp.dtype(jnp.float32 if wide or group % 2 else jnp.bfloat16),
        soft_cap=spec.soft_cap,
        window=spec.sliding_window,
        has_lse=spec.return_lse,
        interpret=interpret,
        blocks=blocks,
    )
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
            f"page_size={page_size} is no multiple of the packing {packing(fused_kv.dtype)} of {fused_kv.dtype}; "
            "choose one that is"
        )


def _check_vmem(geo: Geometry, generation: str) -> None:
    """Refuses blocks that the compiler could not place: it would fail where no other backend is tried any more."""
    buffers = [buffer for part in scratch_shapes(geo) for buffer in part]
    needed = sum(math.prod(buffer.shape) * jnp.dtype(buffer.dtype).itemsize for buffer in buffers)
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
            "or fewer sequences a step"
        )


def _scaled_queries(geo: Geometry, q: jax.Array, sm_scale: float, k_scale: jax.Array | None) -> jax.Array:
    """Queries as ``[T, H, G, D']`` float32 with every factor of the logits in it: the kernel multiplies none."""
    scale = sm_scale * LOG2_E if geo.soft_cap is None else sm_scale / geo.soft_cap
    grouped = q.reshape(q.shape[0], geo.heads, geo.group, q.shape[-1]).astype(jnp.float32) * scale
    if k_scale is not None:
        grouped = grouped * k_scale[None, :, None, None].astype(jnp.float32)
    return jnp.pad(grouped, [(0, 0)] * 3 + [(0, geo.lanes - q.shape[-1])])


def _decode_queries(geo: Geometry, grouped: jax.Array, cu_q_lens: jax.Array) -> jax.Array:
    """The first query of each sequence, ``[B, H, decode_rows, D']``."""
    first = jnp.minimum(cu_q_lens[:-1], grouped.shape[0] - 1)
    rows = grouped[first].astype(geo.compute_dtype)
    return jnp.pad(rows, [(0, 0), (0, 0), (0, geo.decode_rows - geo.group), (0, 0)])


def _prefill_queries(geo: Geometry, grouped: jax.Array) -> jax.Array:
    """``[H, T + block, G / p, p, D']``: a block that starts at the last token still reads within the array."""
    padded = jnp.pad(grouped.astype(geo.io_dtype), [(0, geo.blocks.prefill_queries), (0, 0), (0, 0), (0, 0)])
    shape = (geo.heads, padded.shape[0], geo.group // geo.io_pack, geo.io_pack, geo.lanes)
    return padded.swapaxes(0, 1).reshape(shape)


def _sink_rows(geo: Geometry, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sinks in the log2 domain, one row of lanes a row of q: for decode and for prefill."""
    logits = sinks.astype(jnp.float32).reshape(geo.heads, geo.group) * LOG2_E
    decode = jnp.pad(logits, [(0, 0), (0, geo.decode_rows - geo.group)])
    prefill = jnp.tile(logits, (1, geo.blocks.prefill_queries))
    decode_rows, prefill_rows = (jnp.broadcast_to(rows[..., None], (*rows.shape, LANES)) for rows in (decode, prefill))
    return decode_rows, prefill_rows


def _token_kinds(cu_q_lens: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each token: whether it is a decode row, whether it is live, and its sequence."""
    index = jnp.arange(tokens)
    batch = cu_q_lens.shape[0] - 1
    seq = jnp.minimum(jnp.searchsorted(cu_q_lens[1:], index, side="right"), batch - 1)
    return (cu_q_lens[seq + 1] - cu_q_lens[seq]) == 1, index < cu_q_lens[-1], seq
