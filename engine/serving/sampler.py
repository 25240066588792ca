"""Chooses the next token of every row on the device."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from engine.serving.request import MAX_LOGPROBS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingInputs:
    """Per row what SamplingParams says; float32 ``temperature`` and ``top_p``, int32 the rest, all ``[B]``."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array
    position: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """The tokens chosen, int32 ``[B]``, their log-probabilities and the most likely tokens'.

    ``logprob`` is float32 ``[B]``; ``top_ids`` and ``top_logprobs`` are ``[B, min(MAX_LOGPROBS, vocab)]``.
    """

    tokens: jax.Array
    logprob: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def sample(logits: jax.Array, inputs: SamplingInputs, wants_logprobs: jax.Array) -> Sampled:
    """Chooses a token a row.

    A row's draw depends on its seed and position alone, never on its place in the batch. What no row of the step
    needs is not run: drawing where every row is greedy, log-probabilities where nobody wants them.

    Args:
        logits: float32 ``[B, vocab]``.
        inputs: how each row chooses.
        wants_logprobs: bool scalar; log-probabilities are zeros without it.
    """
    tokens = lax.cond(jnp.any(inputs.temperature > 0), _draw_all, _most_likely, logits, inputs)
    sampled: Sampled = lax.cond(wants_logprobs, _with_logprobs, _without_logprobs, logits, tokens)
    return sampled


def most_likely(logits: jax.Array) -> jax.Array:
    """The greedy choice: int32 ``[B]`` of float32 ``[B, vocab]``."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _most_likely(logits: jax.Array, _: SamplingInputs) -> jax.Array:
    return most_likely(logits)


def _draw_all(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    drawn = jax.vmap(_draw)(logits, inputs.temperature, inputs.top_k, inputs.top_p, inputs.seed, inputs.position)
    return jnp.where(inputs.temperature > 0, drawn, most_likely(logits))


def _with_logprobs(logits: jax.Array, tokens: jax.Array) -> Sampled:
    distribution = jax.nn.log_softmax(logits, axis=-1)
    top_logprobs, top_ids = lax.top_k(distribution, min(MAX_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(distribution, tokens[:, None], axis=-1)[:, 0]
    return Sampled(tokens, chosen, top_ids.astype(jnp.int32), top_logprobs)


def _without_logprobs(logits: jax.Array, tokens: jax.Array) -> Sampled:
    top = (logits.shape[0], min(MAX_LOGPROBS, logits.shape[-1]))
    return Sampled(tokens, jnp.zeros(top[:1]), jnp.zeros(top, jnp.int32), jnp.zeros(top))


def _draw(
    logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array, seed: jax.Array, position: jax.Array
) -> jax.Array:
    """One row's token: temperature, then top-k, then top-p (the nucleus, arXiv 1904.09751), then Gumbel-max."""
    order = jnp.argsort(-logits)  # stable: equal logits keep the order of their ids
    # Distances to the best logit, so that a tiny temperature cannot overflow.
    scaled = (logits[order] - logits[order[0]]) / jnp.where(temperature > 0, temperature, 1.0)
    rank = jnp.arange(logits.shape[-1])
    scaled = jnp.where((top_k == 0) | (rank < top_k), scaled, -jnp.inf)
    probabilities = jax.nn.softmax(scaled)
    before = jnp.cumsum(probabilities) - probabilities
    # Rank 0 always stays, whatever rounding makes of the sum before it.
    scaled = jnp.where((rank == 0) | (before < top_p), scaled, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(seed), position)
    winner = jnp.argmax(scaled + jax.random.gumbel(key, scaled.shape))
    return order[winner].astype(jnp.int32)
