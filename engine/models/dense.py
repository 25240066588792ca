"""The forward pass without a cache: plain causal attention over unfused K and V.

It shares no code with the paged path below the projections, which makes it an independent check; training uses it too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from engine.models.decoder import Decoder
from engine.models.model_config import AttentionKind


def causal_attention(q: Array, k: Array, v: Array, sinks: Array | None, options: AttentionKind) -> Array:
    """Attention within one sequence; scores and softmax are float32.

    Args:
        q: ``[T, Hq, D]``, ``Hq`` a multiple of ``H``.
        k: ``[T, H, D]``.
        v: ``[T, H, D]``.
        sinks: ``[Hq]``, a logit per query head that joins the softmax and has no value, or None.
        options: scale, window and soft cap.

    Returns:
        ``[T, Hq, D]`` in q's dtype.
    """
    tokens, heads, dim = k.shape
    grouped = q.reshape(tokens, heads, -1, dim)
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("qhgd,khd->hgqk", grouped, k, precision=highest, preferred_element_type=jnp.float32)
    scores = scores * options.sm_scale
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    distance = jnp.arange(tokens)[:, None] - jnp.arange(tokens)[None, :]
    seen = distance >= 0 if options.window is None else (distance >= 0) & (distance < options.window)
    scores = jnp.where(seen[None, None], scores, -jnp.inf)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(heads, -1, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :tokens]
    out = jnp.einsum("hgqk,khd->qhgd", weights, v.astype(jnp.float32), precision=highest)
    return out.reshape(q.shape).astype(q.dtype)


def as_computed(k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values unchanged: what training attends to."""
    return k, v


def dense_logits(
    model: Decoder, token_ids: Array, kept: Callable[[Array, Array], tuple[Array, Array]] = as_computed
) -> Array:
    """The logits after every token of one sequence, or of several independent sequences of equal length.

    Args:
        model: the weights.
        token_ids: int32 ``[..., T]``.
        kept: what attention sees of the keys and values ``[N, H, D]`` of a layer, e.g. rounded as a cache keeps them.

    Returns:
        float32 ``[..., T, vocab_size]``.
    """
    length = token_ids.shape[-1]
    layers = model.config.layer_attention

    def attend(layer_id: int, q: Array, k: Array, v: Array, sinks: Array | None) -> Array:
        k, v = kept(k, v)
        # All sequences go through the projections as one run of tokens: one large product instead of many small ones.
        attention = jax.vmap(partial(causal_attention, sinks=sinks, options=layers[layer_id]))
        return attention(*(x.reshape(-1, length, *x.shape[1:]) for x in (q, k, v))).reshape(q.shape)

    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), token_ids.shape)
    logits = model.logits(model(token_ids.reshape(-1), positions.reshape(-1), attend))
    return logits.reshape(*token_ids.shape, -1)
