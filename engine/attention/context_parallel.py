"""Context parallel attention: every device attends the tokens that it holds, and the parts are merged.

Slots are dealt out in turn (``engine.kv.split``), so device ``c`` of ``n`` holds the positions ``c, c + n, c + 2n, …``
of every sequence. Of the queries at positions ``r, r + n, r + 2n, …`` each sees one local token more than the one
before: an ordinary causal sequence. A sequence's new tokens are therefore attended as ``n`` sequences, one for each
remainder ``r``, by any implementation, prefill and decode alike. The results are merged by their log-sum-exp, as
in flash-decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from engine.attention.impl.implementation import AttentionResult
from engine.attention.layer import FlashAttentionBackend
from engine.attention.metadata import AttentionMetadata, is_live, running_sum, sequence_of_tokens
from engine.attention.options import HeadArrays
from engine.distributed.mesh import CONTEXT_AXIS
from engine.kv.narrow import Buffer
from engine.kv.scatter import set_kv_buffer
from engine.kv.split import local_slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ContextRows:
    """A step as one device sees it, T tokens of B sequences as ``n * B`` rows.

    Attributes:
        order: ``[T]`` the tokens row by row; those that see nothing on this device come last.
        place: ``[T]`` the inverse: where each token is in ``order``.
        out_cache_loc: ``[T]`` this device's slots of the new tokens, in the step's order; -1 for what others hold.
        rows: the rows' page table, bounds, lengths and positions; it writes nothing.
    """

    order: jax.Array
    place: jax.Array
    out_cache_loc: jax.Array
    rows: AttentionMetadata


def rows_of_device(metadata: AttentionMetadata, parts: int) -> ContextRows:
    """Within ``shard_map``: what this device of ``parts`` along the context axis does in a step.

    Args:
        metadata: metadata of the replica's sequences, with slots and positions as the control plane counts them.
        parts: n, number of devices along the axis.
    """
    table, bounds, lens, loc, positions = (
        jnp.asarray(getattr(metadata, name))
        for name in ("page_table", "cu_q_lens", "kv_lens", "out_cache_loc", "positions")
    )
    bounds, rank = running_sum(bounds), lax.axis_index(CONTEXT_AXIS)
    tokens = jnp.arange(loc.shape[0], dtype=jnp.int32)
    sequence = sequence_of_tokens(bounds, num_tokens=tokens.size, xp=jnp).astype(jnp.int32)
    sees = is_live(bounds, num_tokens=tokens.size, xp=jnp) & (positions >= rank)
    last = lens.shape[0] * parts
    row = jnp.where(sees, sequence * parts + positions % parts, last)
    visible = (positions - rank) // parts + 1
    order = jnp.argsort(row, stable=True).astype(jnp.int32)
    counts = jnp.zeros(last, jnp.int32).at[row].add(1, mode="drop")
    return ContextRows(
        order=order,
        place=jnp.zeros_like(order).at[order].set(tokens, unique_indices=True),
        out_cache_loc=local_slots(loc, parts),
        rows=AttentionMetadata(
            page_table=jnp.repeat(table, parts, axis=0),
            cu_q_lens=jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)]),
            kv_lens=jnp.zeros(last, jnp.int32).at[row].max(visible, mode="drop"),
            out_cache_loc=jnp.full_like(loc, -1),
            positions=jnp.where(sees, visible - 1, 0)[order],
        ),
    )


def attend_part(
    local: FlashAttentionBackend,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: Buffer,
    step: ContextRows,
    heads: HeadArrays,
) -> AttentionResult:
    """Within ``shard_map``: writes what this device holds, attends it, and merges with the others.

    Args:
        local: the backend, its page size and window those of one device.
        q: ``[T, Hq, D]`` queries, the same on every device of the axis.
        k: ``[T, H, D]`` new keys, likewise.
        v: ``[T, H, D]`` new values, likewise.
        fused_kv: this device's part of the buffer.
        step: result of ``rows_of_device``.
        heads: sinks and scales.

    Returns:
        ``out [T, Hq, D]`` in q's dtype, the same on every device of the axis; and the written part; no log-sum-exp.
    """
    # Queries are put in the order of the rows, keys and values are not: they are written apart, before.
    fused_kv = set_kv_buffer(fused_kv, step.out_cache_loc, *heads.scale_kv(k, v))
    heads_of_part = heads._replace(sinks=None)  # a sink joins the denominator once, when the parts are merged
    result = local.attend(q[step.order], k, v, fused_kv, step.rows, heads_of_part, return_lse=True)
    part, fused_kv, lse = result.plain()
    return AttentionResult(merge_parts(part[step.place], lse[step.place], heads.sinks), fused_kv)


def merge_parts(part: jax.Array, lse: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Within ``shard_map``: attention over everything from attention over each device's part.

    Args:
        part: ``[T, Hq, D]`` this device's output.
        lse: ``[T, Hq]`` float32, minus infinity where a row saw nothing.
        sinks: ``[Hq]`` logits that join the denominator once, or None.

    Returns:
        ``[T, Hq, D]`` in part's dtype; 0 where no device saw anything.
    """
    peak = lax.pmax(lse, CONTEXT_AXIS)
    if sinks is not None:
        peak = jnp.maximum(peak, sinks.astype(jnp.float32))
    base = jnp.where(peak == -jnp.inf, 0.0, peak)
    weight = jnp.exp(lse - base)
    total = lax.psum(weight, CONTEXT_AXIS)
    if sinks is not None:
        total += jnp.exp(sinks.astype(jnp.float32) - base)
    merged = lax.psum(part.astype(jnp.float32) * weight[..., None], CONTEXT_AXIS)
    out: jax.Array = (merged / jnp.where(total > 0, total, 1.0)[..., None]).astype(part.dtype)
    return out
