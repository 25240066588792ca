"""Ragged paged attention on a Hopper GPU: writes the new tokens, cuts the step into work, calls the kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from engine.attention.impl.gpu.cut_work import cut_work
from engine.attention.impl.gpu.kernel.decode_chunks import decode_chunks
from engine.attention.impl.gpu.kernel.merge_chunks import merge_chunks
from engine.attention.impl.gpu.kernel.prefill_tiles import prefill_tiles
from engine.attention.impl.gpu.kernel.registers import LOG2_E
from engine.attention.impl.gpu.kernel.sizes import Sizes
from engine.attention.impl.gpu.work import StepWork
from engine.attention.impl.implementation import AttentionResult
from engine.attention.metadata import AttentionMetadata, is_live, sequence_of_tokens
from engine.attention.options import AttentionOptions, HeadArrays
from engine.kv.layout import to_stored
from engine.kv.scatter_gpu import scatter_gpu

HeadValues = jax.Array | npt.NDArray[np.float32]  # NumPy where they are known: constants need no launch
BLOCKS = 132  # streaming multiprocessors of an H100 or H200 with SXM; correct, if slower, on any other
SMALLEST_FACTOR = 1e-30  # instead of 0, whose product with minus infinity is NaN


def ragged_paged_attention_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: jax.Array,
    metadata: AttentionMetadata,
    heads: HeadArrays,
    options: AttentionOptions,
    *,
    blocks: int = BLOCKS,
    interpret: Any = False,
) -> AttentionResult:
    """Writes the new K and V into their pages, then attends: decode rows in chunks, longer ones in tiles.

    Arguments and results are those of an ``Implementation`` that fuses the write. No two tokens may go to one slot, so
    that the write needs no search for equal slots; scales go into the kernels' factors. The algorithms are
    FlashAttention-3's over the paged, interleaved cache, and flash-decoding's split-K.

    Args:
        q: ``[T, Hq, D]`` bfloat16 or float16, D 64 or 128.
        k: ``[T, H, D]`` new keys.
        v: as ``k``.
        fused_kv: ``[S, 2H, D]`` of q's dtype, donated for a write in place.
        metadata: the sequences of the step.
        heads: sinks and scales.
        options: the layer's options; pages of a multiple of 8 tokens.
        blocks: thread blocks of decode that run at once.
        interpret: False, or ``plgpu.InterpretGPUParams`` to run on a CPU.
    """
    sizes = _sizes(q, k.shape[1], options, has_sinks=heads.sinks is not None, blocks=blocks, interpret=bool(interpret))
    if heads.logit_scale is not None:  # its sign goes to q, which keeps its bits
        q = jnp.where(heads.logit_scale < 0, -q, q)
    k, v = (to_stored(half, fused_kv.dtype) for half in heads.scale_kv(k, v))
    with jax.enable_x64(False):  # a kernel counts in 32 bits, whatever the program around it does
        slots = jnp.asarray(metadata.out_cache_loc, jnp.int32)
        fused_kv = scatter_gpu(fused_kv, slots, None, k, v, interpret=interpret)
        work = cut_work(sizes, metadata, num_tokens=q.shape[0], cache_pages=fused_kv.shape[0] // options.page_size)
        out, row_lse, tile_lse = _attend(sizes, q, fused_kv, work, heads, options, interpret)
        if not options.return_lse:
            return AttentionResult(out, fused_kv)
        lse = _lse_of_tokens(sizes, metadata, work, row_lse, tile_lse, num_tokens=q.shape[0])
    return AttentionResult(out, fused_kv, lse)


def _sizes(
    q: jax.Array, kv_heads: int, options: AttentionOptions, *, has_sinks: bool, blocks: int, interpret: bool
) -> Sizes:
    return Sizes(
        heads=kv_heads,
        group=q.shape[1] // kv_heads,
        head_dim=q.shape[2],
        page_size=options.page_size,
        dtype=jnp.dtype(q.dtype),
        blocks=blocks,
        window=options.sliding_window,
        soft_cap=options.soft_cap,
        has_sinks=has_sinks,
        interpret=interpret,
    )


def _attend(
    sizes: Sizes,
    q: jax.Array,
    fused_kv: jax.Array,
    work: StepWork,
    heads: HeadArrays,
    options: AttentionOptions,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output ``[T, Hq, D]``, and the log-sum-exps of decode rows and of tiles."""
    cache = fused_kv.reshape(fused_kv.shape[0], sizes.heads, 2 * sizes.head_dim)
    factor, v_scale = _factors(heads, options, sizes.heads)
    sinks: HeadValues = np.zeros(q.shape[1], np.float32)
    if heads.sinks is not None:
        sinks = jnp.asarray(heads.sinks, jnp.float32) * LOG2_E
    queries = _decode_queries(sizes, q, work)
    part, part_lse = decode_chunks(sizes, queries, cache, work.table, factor, work.chunks, interpret=interpret)
    out, tile_lse = prefill_tiles(sizes, q, cache, work.table, factor, v_scale, sinks, work.tiles, interpret=interpret)
    written = jax.new_ref(out)
    row_scale, row_sinks = _part_rows(sizes, v_scale.repeat(sizes.group)), _part_rows(sizes, sinks)
    row_lse = merge_chunks(sizes, part, part_lse, row_scale, row_sinks, work.rows, written, interpret=interpret)
    return written[...], row_lse, tile_lse


def _factors(heads: HeadArrays, options: AttentionOptions, kv_heads: int) -> tuple[HeadValues, HeadValues]:
    """Factors ``[H]`` float32 that make exponents of 2 of logits, and true values of stored ones."""
    factor: HeadValues = np.full(kv_heads, max(options.sm_scale * LOG2_E, SMALLEST_FACTOR), np.float32)
    if heads.k_scale is not None:
        factor = factor * jnp.asarray(heads.k_scale, jnp.float32)
    if heads.logit_scale is not None:
        factor = jnp.maximum(factor * jnp.abs(jnp.asarray(heads.logit_scale, jnp.float32)), SMALLEST_FACTOR)
    v_scale: HeadValues = np.ones(kv_heads, np.float32)
    if heads.v_scale is not None:
        v_scale = jnp.asarray(heads.v_scale, jnp.float32)
    return factor, v_scale


def _decode_queries(sizes: Sizes, q: jax.Array, work: StepWork) -> jax.Array:
    """The first query of each row of the page table, ``[B, H, G', D]``, each group padded to whole rows of a tile."""
    first = q[jnp.minimum(work.rows.token, q.shape[0] - 1)].reshape(-1, sizes.heads, sizes.group, sizes.head_dim)
    return jnp.pad(first, ((0, 0), (0, 0), (0, sizes.group_rows - sizes.group), (0, 0)))


def _part_rows(sizes: Sizes, by_query_head: HeadValues) -> HeadValues:
    """``[Hq]`` in the order of a chunk's results, ``[R]``, padded to whole tiles."""
    xp: Any = jnp if isinstance(by_query_head, jax.Array) else np
    grouped = xp.pad(by_query_head.reshape(sizes.heads, sizes.group), ((0, 0), (0, sizes.group_rows - sizes.group)))
    rows: HeadValues = xp.pad(grouped.reshape(-1), (0, sizes.tiled_rows - sizes.chunk_rows))
    return rows


def _lse_of_tokens(
    sizes: Sizes,
    metadata: AttentionMetadata,
    work: StepWork,
    row_lse: jax.Array,
    tile_lse: jax.Array,
    *,
    num_tokens: int,
) -> jax.Array:
    """Natural log-sum-exps ``[T, Hq]`` from those of decode rows and of tiles; minus infinity for padding tokens."""
    bounds = jnp.asarray(metadata.cu_q_lens)
    row = sequence_of_tokens(bounds, num_tokens=num_tokens, xp=jnp)
    live = is_live(bounds, num_tokens=num_tokens, xp=jnp)
    grouped = row_lse[:, : sizes.chunk_rows].reshape(-1, sizes.heads, sizes.group_rows)
    decoded = grouped[:, :, : sizes.group].reshape(-1, sizes.heads * sizes.group)[row]
    tiles, token = work.tiles, jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
    exists = jnp.arange(tiles.row.shape[0]) < tiles.count[0]
    place = token - tiles.token[None]
    mine = (exists & (tiles.token < num_tokens))[None] & (place >= 0) & (place < tiles.valid[None])
    tile = jnp.argmax(mine, axis=1)
    by_place = tile_lse.swapaxes(2, 3).reshape(tile_lse.shape[0], sizes.tile_tokens, -1)
    tiled = by_place[tile, jnp.clip(token[:, 0] - tiles.token[tile], 0, sizes.tile_tokens - 1)]
    lse = jnp.where((work.rows.count[row] > 0)[:, None], decoded, tiled) / LOG2_E
    return jnp.where(live[:, None], lse, -jnp.inf)
