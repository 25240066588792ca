"""Chooses the next token of every row on the device.

A draw is the kept token with the largest sum of logit and noise (Gumbel-max). The noise of a token follows from seed,
position and token id alone, so a rounding of logits changes a draw only where two sums lie within that rounding. The
bits are those of Threefry-2x32, called by name, so jax's settings of generator and precision do not change them; the
noise is always float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p

from engine.serving.device.parcel import NOT_A_TOKEN
from engine.serving.sampling_params import MAX_LOGPROBS

_BELOW_ONE = np.float32(1 - 2**-24)  # the float32 before 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingInputs:
    """SamplingParams of each row, all ``[B]``: ``temperature`` and ``top_p`` are float32, the others int32."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array
    position: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ToSample:
    """What a step leaves for the sampler: two arrays only, since every result of a program costs the host microseconds.

    Attributes:
        logits: float32 ``[B, vocab]``, split over a mesh by replica and by vocabulary.
        words: int32 ``[sampling_size]``, the beginning of the packed parcel: how and for which rows to choose.
    """

    logits: jax.Array
    words: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """The chosen tokens with log-probabilities; where a token is ``NOT_A_TOKEN`` the rest of its row means nothing.

    Attributes:
        tokens: int32 ``[B]``.
        logprob: float32 ``[B]``, log-probabilities of these tokens.
        top_ids: int32 ``[B, min(MAX_LOGPROBS, vocab)]``, the most likely tokens, best first.
        top_logprobs: float32, of the same shape, their log-probabilities.
    """

    tokens: jax.Array
    logprob: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def sample(
    logits: jax.Array, inputs: SamplingInputs, wants_logprobs: jax.Array, chosen_by: jax.Array | None = None
) -> Sampled:
    """Chooses one token per row.

    A row's draw depends on its logits, seed and position alone, never on its place in the batch. What no row of the
    step needs is skipped: drawing where every row is greedy, the sort where no row that draws leaves tokens out,
    log-probabilities where no request wants them.

    Args:
        logits: float32 ``[B, vocab]``; -inf is a token that cannot be chosen.
        inputs: how each row chooses.
        wants_logprobs: bool scalar; where it is false, log-probabilities are zeros.
        chosen_by: the logits to choose by, where some rows adjust the model's; log-probabilities are of ``logits``.

    Returns:
        Tokens; ``NOT_A_TOKEN`` for a row whose logits are not usable, see ``most_likely``.
    """
    chosen_by = logits if chosen_by is None else chosen_by
    tokens = lax.cond(jnp.any(inputs.temperature > 0), _draw_all, _most_likely, chosen_by, inputs)
    sampled: Sampled = lax.cond(wants_logprobs, _with_logprobs, _without_logprobs, logits, tokens)
    return sampled


def most_likely(logits: jax.Array) -> jax.Array:
    """The greedy choice: int32 ``[B]`` from float32 ``[B, vocab]``; of equal logits the lowest id.

    ``NOT_A_TOKEN`` where a row has a NaN or +inf, or nothing but -inf.
    """
    # One reduction over pairs of logit and id, because a maximum over several devices' parts may lose a NaN. A NaN or
    # +inf carries NOT_A_TOKEN as its id, so the winner's id says all and no second look at its logit is needed.
    spoils = jnp.isnan(logits) | jnp.isposinf(logits)
    ids = jnp.where(spoils, NOT_A_TOKEN, lax.broadcasted_iota(jnp.int32, logits.shape, 1))
    least = (np.float32(-np.inf), np.int32(NOT_A_TOKEN))  # wins a tie with -inf, its id being the lowest
    best: jax.Array = lax.reduce((logits, ids), least, _better, dimensions=(1,))[1]
    return best


def _better(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The larger logit with its id: a NaN beats any number, and of equal logits the lower id wins."""
    (logit, token), (rival, rival_token) = one, other
    wins = (logit > rival) | (logit != logit) | ((logit == rival) & (token < rival_token))
    return jnp.where(wins, logit, rival), jnp.where(wins, token, rival_token)


def _most_likely(logits: jax.Array, _: SamplingInputs) -> jax.Array:
    return most_likely(logits)


def _draw_all(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    greedy = most_likely(logits)
    draws = inputs.temperature > 0
    leaves_out = draws & ((inputs.top_p < 1) | ((inputs.top_k > 0) & (inputs.top_k < logits.shape[-1])))
    kept = lax.cond(jnp.any(leaves_out), jax.vmap(_kept), _all_kept, logits, inputs)
    scores = below_best(logits, inputs.temperature) + _noise(inputs, logits.shape[-1])
    drawn = jnp.argmax(jnp.where(kept, scores, -jnp.inf), axis=-1).astype(jnp.int32)
    return jnp.where(draws & (greedy != NOT_A_TOKEN), drawn, greedy)


def below_best(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Logits over the temperature, less the best of their row: ``[B, vocab]``, at most 0.

    What float32 cannot hold of them is -inf: a tiny temperature cannot overflow.
    """
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / _divisor(temperature)[:, None]


def _divisor(temperature: jax.Array) -> jax.Array:
    """The temperature within what float32 can divide -inf and 0 by, also by way of a reciprocal."""
    return jnp.clip(temperature, 1e-30, 1e30)


def _all_kept(logits: jax.Array, _: SamplingInputs) -> jax.Array:
    return jnp.ones(logits.shape, jnp.bool_)


def _kept(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Which tokens of one row may be drawn: top-k, then top-p (the nucleus, arXiv 1904.09751) of those kept.

    Of equal logits at the edge, those with the lower ids are kept.
    """
    ranked = -jnp.sort(-logits)
    rank = lax.iota(jnp.int32, logits.size)
    in_top_k = (inputs.top_k == 0) | (rank < inputs.top_k)
    scaled = (ranked - ranked[0]) / _divisor(inputs.temperature)
    probabilities = jax.nn.softmax(jnp.where(in_top_k, scaled, -jnp.inf))
    before = jnp.cumsum(probabilities) - probabilities
    # top_p >= 1 apart, since rounding may bring the sum to 1 before the last token; the first token always stays.
    in_nucleus = (inputs.top_p >= 1) | (before < inputs.top_p) | (rank == 0)
    count = jnp.sum(in_top_k & in_nucleus, dtype=jnp.int32)
    edge = ranked[count - 1]
    at_edge = logits == edge
    room = count - jnp.sum(logits > edge, dtype=jnp.int32)
    return (logits > edge) | (at_edge & (jnp.cumsum(at_edge, dtype=jnp.int32) <= room))


def _noise(inputs: SamplingInputs, vocab: int) -> jax.Array:
    """Standard Gumbel noise for every row and token, float32 ``[B, vocab]``: finite, between -2.9 and 22.9."""
    none = jnp.zeros((1, 1), jnp.uint32)
    seed, position = (x.astype(jnp.uint32)[:, None] for x in (inputs.seed, inputs.position))
    high, low = _hash(*_hash(none, seed, none, position), none, lax.broadcasted_iota(jnp.uint32, (1, vocab), 1))
    # Large noise comes from small fractions, where float32 keeps every bit: few ties, however many tokens.
    fraction = jnp.minimum(((high ^ low).astype(jnp.float32) + 0.5) * np.float32(2**-32), _BELOW_ONE)
    return -jnp.log(-jnp.log1p(-fraction))


def _hash(*keys_and_counts: jax.Array) -> Sequence[jax.Array]:
    """Threefry-2x32 of two key words and two count words, uint32, broadcast together: two words."""
    words: Sequence[jax.Array] = threefry2x32_p.bind(*jnp.broadcast_arrays(*keys_and_counts))
    return words


def _with_logprobs(logits: jax.Array, tokens: jax.Array) -> Sampled:
    distribution = jax.nn.log_softmax(logits, axis=-1)
    top_logprobs, top_ids = lax.top_k(distribution, min(MAX_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(distribution, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
    return Sampled(tokens, chosen, top_ids.astype(jnp.int32), top_logprobs)


def _without_logprobs(logits: jax.Array, tokens: jax.Array) -> Sampled:
    top = (logits.shape[0], min(MAX_LOGPROBS, logits.shape[-1]))
    zeros = jnp.zeros(top, jnp.float32)
    return Sampled(tokens, zeros[:, 0], jnp.zeros(top, jnp.int32), zeros)
