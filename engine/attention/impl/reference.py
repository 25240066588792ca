"""``impl="reference"``: attention over the fused, paged cache, written as its definition reads. Slow.

One query token at a time gathers its sequence's whole context; softmax is plain, in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from engine.attention.impl.implementation import AttentionResult
from engine.attention.metadata import AttentionMetadata, is_live, sequence_of_tokens
from engine.attention.options import AttentionOptions, HeadArrays
from engine.kv.layout import extract_k_from_fused_kv, extract_v_from_fused_kv
from engine.kv.narrow import Buffer
from engine.kv.stored import take_slots


def attend_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: Buffer,
    metadata: AttentionMetadata,
    heads: HeadArrays,
    options: AttentionOptions,
) -> AttentionResult:
    """Attends over a cache that holds the new tokens; see ``Implementation``."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    page_table, cu_q_lens = jnp.asarray(metadata.page_table), jnp.asarray(metadata.cu_q_lens)
    rows = sequence_of_tokens(cu_q_lens, num_tokens=num_tokens, xp=jnp)
    columns = jnp.arange(page_table.shape[1] * options.page_size)  # a column is a position in the context

    def attend_token(query: jax.Array, row: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        slots = page_table[row][columns // options.page_size] * options.page_size + columns % options.page_size
        context = take_slots(fused_kv, slots, num_kv_heads, head_dim)  # [L, 2H, D]
        visible = columns <= position
        if options.sliding_window is not None:
            visible &= columns > position - options.sliding_window
        # Masked values must not reach the sum even where a dead slot holds NaN, and 0 * NaN is NaN.
        values = jnp.where(visible[:, None, None], extract_v_from_fused_kv(context), 0.0)
        grouped = query.astype(jnp.float32).reshape(num_kv_heads, -1, head_dim)
        logits = jnp.einsum("hgd,lhd->hgl", grouped, extract_k_from_fused_kv(context)) * options.sm_scale
        if options.soft_cap is not None:
            logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
        logits = jnp.where(visible, logits, -jnp.inf)
        if heads.sinks is not None:
            sink = jnp.asarray(heads.sinks, jnp.float32).reshape(num_kv_heads, -1, 1)
            logits = jnp.concatenate([logits, sink], axis=-1)
        lse = jax.nn.logsumexp(logits, axis=-1)
        # A row that sees nothing has minus infinity, and -inf - -inf is NaN.
        weights = jnp.exp(logits - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])[..., : columns.size]
        out = jnp.einsum("hgl,lhd->hgd", weights, values)
        return out.reshape(num_q_heads, head_dim), lse.reshape(num_q_heads)

    out, lse = lax.map(lambda args: attend_token(*args), (q, rows, jnp.asarray(metadata.positions)))
    live = is_live(cu_q_lens, num_tokens=num_tokens, xp=jnp)
    out, lse = jnp.where(live[:, None, None], out, 0.0), jnp.where(live[:, None], lse, -jnp.inf)
    return AttentionResult(out, fused_kv, lse if options.return_lse else None)
