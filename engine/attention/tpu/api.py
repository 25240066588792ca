"""Ragged paged attention on TPU with the contract of ``engine.ragged_paged_attention``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from engine.attention.tpu.block_sizes import VMEM_BYTES, choose_blocks, run_pages
from engine.attention.tpu.flash import LOG2_E
from engine.attention.tpu.geometry import LANES, BlockSizes, Geometry
from engine.attention.tpu.kernel import call_kernel
from engine.attention.tpu.schedule import make_schedule
from engine.errors import BackendUnsupported, ShapeError

KV_DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "float8_e5m2")


def ragged_paged_attention_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: jax.Array,
    *,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    page_size: int,
    sm_scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    return_lse: bool = False,
    blocks: BlockSizes | None = None,
    generation: str = "v6e",
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Writes the new K and V into their pages, then attends causally, in one kernel.

    The algorithm is FlashAttention-2 over the paged, interleaved cache of tpu_commons' kernel v3.

    Args:
        q: ``[T, Hq, D]`` bfloat16 or float32.
        k: ``[T, H, D]`` new keys.
        v: as ``k``.
        fused_kv: ``[S, 2H', D']``, donated for a write in place; D' a multiple of 128 and 2H' whole words, as a pool
            laid out for a TPU stores them; bfloat16, float32 or an 8-bit float.
        page_table: ``[B, P]`` int32.
        cu_q_lens: ``[B + 1]`` int32, new tokens.
        kv_lens: ``[B]`` int32, cached plus new tokens.
        page_size: tokens a page.
        sm_scale: factor of the logits; None is ``D ** -0.5``.
        sliding_window: tokens that a query sees, itself included; None sees all.
        soft_cap: cap of the logits, ``c * tanh(s / c)``.
        sinks: ``[Hq]`` one extra logit a head in the softmax denominator.
        k_scale: ``[H]`` float32 by which stored keys are multiplied on reading, and new ones divided on writing.
        v_scale: as ``k_scale``, of the values.
        return_lse: whether to return the log-sum-exp of each row too.
        blocks: block sizes; None takes the formula's.
        generation: the target, "v5e", "v6e" or "v7x".
        interpret: False, or ``pltpu.InterpretParams`` to run on a CPU.

    Returns:
        ``out [T, Hq, D]`` in q's dtype, zero past ``cu_q_lens[B]``, then with ``return_lse`` the log-sum-exp
        ``[T, Hq]`` float32 (natural log, minus infinity past the end), and last the buffer.

    Raises:
        ShapeError: shapes do not fit one another.
        BackendUnsupported: the storage has a dtype or padding that this kernel cannot take.
    """
    tokens, q_heads, head_dim = q.shape
    heads = k.shape[1]
    _check(q, k, v, fused_kv, page_size)
    slots, rows, lanes = fused_kv.shape
    kv_dtype = fused_kv.dtype
    pack = 4 // kv_dtype.itemsize
    words, group = rows // pack, q_heads // heads
    wide = q.dtype == jnp.float32 or kv_dtype == jnp.float32
    io_dtype = jnp.dtype(jnp.float32 if wide or group % 2 else jnp.bfloat16)
    blocks = blocks or choose_blocks(
        generation=generation,
        heads=heads,
        group=group,
        lanes=lanes,
        bytes_per_token=(words | 1) * 4 * lanes,
        page_size=page_size,
        longest=page_table.shape[1] * page_size,
    )
    pages_in_run = run_pages(page_size, blocks)
    geo = Geometry(
        heads=heads,
        group=group,
        lanes=lanes,
        words=words,
        page_size=page_size,
        run_pages=pages_in_run,
        table_pages=-(-page_table.shape[1] // pages_in_run) * pages_in_run,
        kv_dtype=kv_dtype,
        compute_dtype=jnp.dtype(jnp.float32 if wide else jnp.bfloat16),
        io_dtype=io_dtype,
        soft_cap=soft_cap,
        window=sliding_window,
        has_lse=return_lse,
        interpret=bool(interpret),
        blocks=blocks,
    )
    schedule = make_schedule(
        page_table,
        cu_q_lens,
        kv_lens,
        num_tokens=tokens,
        prefill_queries=blocks.prefill_queries,
        run_pages=pages_in_run,
    )
    grouped = _scaled_queries(geo, q, sm_scale, k_scale)
    *results, cache = call_kernel(
        geo,
        schedule,
        _decode_queries(geo, grouped, cu_q_lens),
        _prefill_queries(geo, grouped),
        _merged_rows(geo, k, v, k_scale, v_scale),
        None if sinks is None else _sink_rows(geo, sinks),
        fused_kv.reshape(slots // page_size, page_size, words, pack, lanes),
        vmem_limit_bytes=int(VMEM_BYTES[generation] * 0.9),
        interpret=interpret,
    )
    is_decode, live, seq = _token_kinds(cu_q_lens, tokens)
    decode_out = results[0][seq][:, :, :group, :head_dim]
    prefill_out = results[1].reshape(heads, -1, group, lanes)[:, :tokens, :, :head_dim].swapaxes(0, 1)
    out = jnp.where(is_decode[:, None, None, None], decode_out, prefill_out)
    if v_scale is not None:
        out = out * v_scale[None, :, None, None].astype(jnp.float32)
    out = jnp.where(live[:, None, None, None], out, 0).astype(q.dtype).reshape(tokens, q_heads, head_dim)
    buffer = cache.reshape(fused_kv.shape)
    if not return_lse:
        return out, buffer
    lse = jnp.where(
        is_decode[:, None, None], results[2][seq][:, :, :group, 0], results[3][:, :tokens, :, 0].swapaxes(0, 1)
    )
    return out, jnp.where(live[:, None, None], lse, -jnp.inf).reshape(tokens, q_heads), buffer


def _check(q: jax.Array, k: jax.Array, v: jax.Array, fused_kv: jax.Array, page_size: int) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise ShapeError(
            f"cannot attend with q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: they must be [T, Hq, D] and "
            "twice [T, H, D]; reshape them"
        )
    if q.shape[1] % k.shape[1]:
        raise ShapeError(f"{q.shape[1]} query heads do not divide among {k.shape[1]} KV heads; use a multiple")
    slots, rows, lanes = fused_kv.shape
    if slots % page_size:
        raise ShapeError(f"a buffer of {slots} slots is no whole number of pages of {page_size}; resize the pool")
    if fused_kv.dtype.name not in KV_DTYPES:
        raise BackendUnsupported(f"the TPU kernel reads caches of {', '.join(KV_DTYPES)}, not {fused_kv.dtype}")
    pack = 4 // fused_kv.dtype.itemsize
    if lanes % LANES or rows % pack or rows < 2 * k.shape[1] or lanes < k.shape[2]:
        raise BackendUnsupported(
            f"the TPU kernel needs slots of whole words and lanes: {k.shape[1]} KV heads of {k.shape[2]} in "
            f"{fused_kv.dtype} rows that are a multiple of {pack} and {LANES} lanes; got [{rows}, {lanes}]; make the "
            "pool with platform='tpu'"
        )
    if page_size % pack:
        raise BackendUnsupported(f"page_size={page_size} is no multiple of the packing {pack} of {fused_kv.dtype}")


def _scaled_queries(geo: Geometry, q: jax.Array, sm_scale: float | None, k_scale: jax.Array | None) -> jax.Array:
    """Queries as ``[T, H, G, D']`` float32 with every factor of the logits in it: the kernel multiplies none."""
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    scale = scale * LOG2_E if geo.soft_cap is None else scale / geo.soft_cap
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


def _merged_rows(
    geo: Geometry, k: jax.Array, v: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None
) -> jax.Array:
    """The new rows as they are stored, ``[T, words, p, D']``."""
    if k_scale is not None:
        k = k / k_scale[None, :, None].astype(jnp.float32)
    if v_scale is not None:
        v = v / v_scale[None, :, None].astype(jnp.float32)
    # merge_kv of engine/kv/layout.py, then the padding of a pool on TPU
    merged = jnp.stack([k.astype(geo.kv_dtype), v.astype(geo.kv_dtype)], axis=2)
    merged = merged.reshape(k.shape[0], 2 * geo.heads, k.shape[2])
    extra = (geo.words * geo.pack - 2 * geo.heads, geo.lanes - k.shape[2])
    merged = jnp.pad(merged, [(0, 0), (0, extra[0]), (0, extra[1])])
    return merged.reshape(k.shape[0], geo.words, geo.pack, geo.lanes)


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
