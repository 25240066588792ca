"""Ragged paged attention on a Hopper GPU: writes the new tokens, plans the step, and calls the kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from engine.attention.gpu.kernel.decode import decode_chunks
from engine.attention.gpu.kernel.merge import merge_chunks
from engine.attention.gpu.kernel.prefill import prefill_tiles
from engine.attention.gpu.kernel.registers import LOG2_E
from engine.attention.gpu.kernel.sizes import Sizes
from engine.attention.gpu.plan import Plan, make_plan
from engine.attention.metadata import AttentionMetadata, is_live, sequence_of_tokens
from engine.attention.spec import AttentionSpec, HeadArrays
from engine.kv.layout import to_stored
from engine.kv.scatter import scatter_xla

SMALLEST_FACTOR = 1e-30  # in place of 0, whose product with minus infinity is NaN


def ragged_paged_attention_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: jax.Array,
    metadata: AttentionMetadata,
    heads: HeadArrays,
    spec: AttentionSpec,
    *,
    sizes: Sizes | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Writes k and v into their pages, then attends."""
    num_tokens, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    slots = fused_kv.shape[0]
    sizes = sizes or Sizes(
        heads=kv_heads,
        group=q_heads // kv_heads,
        head_dim=head_dim,
        page_size=spec.page_size,
        dtype=fused_kv.dtype,
        window=spec.sliding_window,
        soft_cap=spec.soft_cap,
        has_sinks=heads.sinks is not None,
        interpret=bool(interpret),
    )
    if heads.logit_scale is not None:  # its sign goes to q, which keeps its bits
        q = jnp.where(heads.logit_scale < 0, -q, q)
    _, k, v = HeadArrays(k_scale=heads.k_scale, v_scale=heads.v_scale).scale(q[:0], k, v)
    k, v = (to_stored(half, fused_kv.dtype) for half in (k, v))
    fused_kv = scatter_xla(fused_kv, jnp.asarray(metadata.out_cache_loc), k, v)
    plan = make_plan(sizes, metadata, num_tokens=num_tokens, cache_pages=slots // spec.page_size)
    cache = fused_kv.reshape(slots, kv_heads, 2 * head_dim)
    factor, v_scale = _factors(heads, spec, kv_heads)
    sinks = jnp.zeros(q_heads, jnp.float32) if heads.sinks is None else heads.sinks.astype(jnp.float32) * LOG2_E
    by_head = q[jnp.minimum(plan.rows.token, num_tokens - 1)].reshape(-1, kv_heads, sizes.group, head_dim)
    by_head = jnp.pad(by_head, ((0, 0), (0, 0), (0, sizes.group_rows - sizes.group), (0, 0)))
    part, part_lse = decode_chunks(sizes, by_head, cache, plan.table, factor, plan.chunks, interpret=interpret)
    out, tile_lse = prefill_tiles(
        sizes, q, cache, plan.table, factor, v_scale, sinks, plan.tiles, interpret=interpret
    )
    out_ref = jax.new_ref(out)
    row_lse = merge_chunks(
        sizes, part, part_lse, _part_rows(sizes, jnp.repeat(v_scale, sizes.group)), _part_rows(sizes, sinks),
        plan.rows, out_ref, interpret=interpret,
    )  # fmt: skip
    out = out_ref[...]
    if not spec.return_lse:
        return out, fused_kv
    return out, fused_kv, _lse_of_tokens(sizes, metadata, plan, row_lse, tile_lse, num_tokens=num_tokens)


def _factors(heads: HeadArrays, spec: AttentionSpec, kv_heads: int) -> tuple[jax.Array, jax.Array]:
    """What makes powers of two of each KV head's logits, and true values of its stored ones; ``[H]`` float32."""
    factor = jnp.full(kv_heads, spec.sm_scale * LOG2_E, jnp.float32)
    if heads.k_scale is not None:
        factor *= heads.k_scale
    if heads.logit_scale is not None:
        factor *= jnp.abs(heads.logit_scale.astype(jnp.float32))
    v_scale = jnp.ones(kv_heads, jnp.float32) if heads.v_scale is None else jnp.asarray(heads.v_scale, jnp.float32)
    return jnp.maximum(factor, SMALLEST_FACTOR), v_scale


def _part_rows(sizes: Sizes, by_query_head: jax.Array) -> jax.Array:
    """``[Hq]`` as the rows ``[R]`` of a chunk's results."""
    grouped = jnp.pad(by_query_head.reshape(sizes.heads, sizes.group), ((0, 0), (0, sizes.group_rows - sizes.group)))
    return jnp.pad(grouped.reshape(-1), (0, sizes.part_rows - sizes.heads * sizes.group_rows))


def _lse_of_tokens(
    sizes: Sizes, metadata: AttentionMetadata, plan: Plan, row_lse: jax.Array, tile_lse: jax.Array, *, num_tokens: int
) -> jax.Array:
    """Natural log-sum-exps ``[T, Hq]`` from those of decode rows and of tiles, minus infinity where a token is dead."""
    bounds = jnp.asarray(metadata.cu_q_lens)
    row = sequence_of_tokens(bounds, num_tokens=num_tokens, xp=jnp)
    live = is_live(bounds, num_tokens=num_tokens, xp=jnp)
    grouped = row_lse[:, : sizes.heads * sizes.group_rows].reshape(-1, sizes.heads, sizes.group_rows)
    decoded = grouped[:, :, : sizes.group].reshape(-1, sizes.heads * sizes.group)[row]
    tile_row = jnp.where(jnp.arange(plan.tiles.row.shape[0]) < plan.tiles.count, plan.tiles.row, -1)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    mine = (tile_row == row[:, None]) & (plan.tiles.token <= token[:, None])
    mine &= token[:, None] < plan.tiles.token + sizes.tile_tokens
    tile = jnp.argmax(mine, axis=1)
    by_place = tile_lse.swapaxes(2, 3).reshape(tile_lse.shape[0], sizes.tile_tokens, -1)
    tiled = by_place[tile, jnp.clip(token - plan.tiles.token[tile], 0, sizes.tile_tokens - 1)]
    lse = jnp.where((plan.rows.count[row] > 0)[:, None], decoded, tiled) / LOG2_E
    return jnp.where(live[:, None], lse, -jnp.inf)
