"""Logits adjusted row by row, by what the row's request asks and what its prompt and answer have already.

The order: biases; the repetition penalty; frequency and presence penalties; the tokens that end answers are out
while this one is too short; min-p leaves out what is too unlikely at the row's temperature. The sampler takes the
result in place of the model's logits: temperature, then top-k, then top-p of what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from engine.serving.device.parcel import NOWHERE
from engine.serving.device.row_entries import (
    CHUNK,
    ONCE_IN_ANSWER,
    RULE_WORDS,
    TOO_EARLY,
    fields_of,
    rules_of,
)
from engine.serving.device.sampler import below_best

Rules = dict[str, jax.Array]
_LARGEST = np.finfo(np.float32).max


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowAdjustments:
    """What the device keeps for each row of a request that adjusts its logits; what other rows hold is never read.

    It takes ``4 * R * (vocab + 605)`` bytes.

    Attributes:
        tokens: int32 ``[R, vocab]``, of each token a word: whether it is in the prompt, whether it may come too
            early, how often the answer has it (``row_entries``).
        rules: int32 ``[R, RULE_WORDS]``, see ``row_entries.RULES``.
    """

    tokens: jax.Array
    rules: jax.Array

    @classmethod
    def empty(cls, rows: int, vocab: int) -> RowAdjustments:
        """``rows`` rows of which nothing is known."""
        return cls(jnp.zeros((rows, vocab), jnp.int32), jnp.zeros((rows, RULE_WORDS), jnp.int32))

    def entered(self, chunk: jax.Array) -> RowAdjustments:
        """Enters int32 ``[CHUNK_WORDS]``, a part of what is to be known of a row; the first part resets the row."""
        new = fields_of(chunk, CHUNK)
        tokens = self.tokens.at[new["reset"]].set(0, mode="drop")
        tokens = tokens.at[new["row"], new["token_ids"]].set(new["words"], mode="drop")
        return RowAdjustments(tokens, self.rules.at[new["reset"]].set(new["rules"], mode="drop"))

    def of(self, rows: jax.Array) -> tuple[jax.Array, Rules]:
        """Words ``[B, vocab]`` and rules ``[B, size]`` of ``rows[B]``; zeros for a row that is padding."""
        words = self.tokens.at[rows].get(mode="fill", fill_value=0)
        return words, rules_of(self.rules.at[rows].get(mode="fill", fill_value=0))


def adjusted(
    logits: jax.Array,
    words: jax.Array,
    rules: Rules,
    position: jax.Array,
    temperature: jax.Array,
    adjusts: jax.Array,
) -> jax.Array:
    """The logits by which each row chooses; a row that does not adjust them keeps its own, bit by bit.

    What is not finite stays, so that the sampler sees it; a finite logit stays finite unless its token is out.

    Args:
        logits: float32 ``[B, vocab]``, the model's.
        words: int32 ``[B, vocab]``, see ``RowAdjustments.tokens``.
        rules: the fields of ``row_entries.RULES``, ``[B, size]`` each.
        position: int32 ``[B]``, of the token to be chosen.
        temperature: float32 ``[B]``; a greedy row (0) does not read ``min_p``.
        adjusts: bool ``[B]``.
    """
    has_biases = jnp.any(adjusts & (rules["bias_ids"][:, 0] != NOWHERE))
    biased = lax.cond(has_biases, _biased, _unbiased, logits, rules)
    moved = jnp.clip(_penalised(biased, words, rules), -_LARGEST, _LARGEST)
    is_out = ((words & TOO_EARLY) != 0) & (position[:, None] < rules["free_from"])
    allowed = jnp.where(is_out, -jnp.inf, moved)
    unlikely = (temperature[:, None] > 0) & (below_best(allowed, temperature) < jnp.log(rules["min_p"]))
    likely = jnp.where(unlikely, -jnp.inf, allowed)
    return jnp.where(adjusts[:, None] & jnp.isfinite(logits), likely, logits)


def counted(tokens: jax.Array, rows: jax.Array, chosen: jax.Array, adjusts: jax.Array) -> jax.Array:
    """Words ``[R, vocab]`` with ``chosen[B]`` counted in ``rows[B]``, where ``adjusts[B]`` and it is a token."""
    counts = jnp.where(adjusts & (chosen >= 0), rows, NOWHERE)
    return tokens.at[counts, jnp.maximum(chosen, 0)].add(np.int32(ONCE_IN_ANSWER), mode="drop")


def _biased(logits: jax.Array, rules: Rules) -> jax.Array:
    rows = lax.broadcasted_iota(jnp.int32, rules["bias_ids"].shape, 0)
    return logits.at[rows, rules["bias_ids"]].add(rules["biases"], mode="drop")


def _unbiased(logits: jax.Array, _: Rules) -> jax.Array:
    return logits


def _penalised(logits: jax.Array, words: jax.Array, rules: Rules) -> jax.Array:
    is_known, count = (words & ~np.int32(TOO_EARLY)) != 0, words // np.int32(ONCE_IN_ANSWER)
    repetition = jnp.where(is_known, rules["repetition"], np.float32(1))
    fewer = jnp.where(logits > 0, logits / repetition, logits * repetition)
    present = (count > 0).astype(jnp.float32)
    return fewer - count.astype(jnp.float32) * rules["frequency"] - present * rules["presence"]
