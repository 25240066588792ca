"""Recomputes generated tokens with dense attention over unfused K and V: no pool, no pages, no fused layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from engine.config import DTYPES
from engine.distributed.mesh import REPLICATED
from engine.errors import ConfigError
from engine.kv.stored import as_stored
from engine.models.decoder import Decoder
from engine.models.dense import as_computed, dense_logits
from engine.serving.request import RequestOutput

# Largest difference of a logit as a fraction of the largest logit. Both sides differ only in the order of sums and in
# rounding. One rounding is half a unit in the last place (2**-24, 2**-11 or 2**-8 of a number), and a logit accumulates
# some from every layer: 16 at 16 bits, where all activations are stored so, and 512 in float32, where sums of thousands
# of terms round. A wrong token or page moves logits by a tenth.
CHECK_BOUND = {"float32": 512 * 2**-24, "float16": 16 * 2**-11, "bfloat16": 16 * 2**-8}
# A pool of 8 or 4 bits rounds keys and values by far more than that, so the dense pass rounds them alike. What is left
# is a number here and there that the one side rounds up and the other down, its own value a rounding apart.
CHECK_BOUND |= {"float8_e4m3fn": 2**-6, "int8": 2**-8, "int4": 2**-5}


@dataclass(frozen=True)
class DenseCheck:
    """How the engine's logits compare with the dense ones.

    Attributes:
        tokens: generated tokens compared.
        largest_difference: largest absolute difference of any logit; NaN where one is not finite.
        argmax_differs: positions where the best token by dense logits is another one.
        bound: largest difference that the dtypes of model and pool explain, for logits of this size.
        not_finite: number of logits, of the engine or of the dense forward pass, that are NaN or infinite.
    """

    tokens: int
    largest_difference: float
    argmax_differs: int
    bound: float
    not_finite: int = 0

    @property
    def passed(self) -> bool:
        """Whether every logit is finite and the largest difference is within the bound."""
        return self.largest_difference <= self.bound

    def describe(self) -> str:
        """One line: what was compared, how far it differs, and the verdict."""
        wrong = f"{self.not_finite} logits are not finite, " if self.not_finite else ""
        return (
            f"{self.tokens} tokens, {wrong}largest logit difference {self.largest_difference:.2e} (bound "
            f"{self.bound:.0e}), {self.argmax_differs} with another best token: {'ok' if self.passed else 'FAILED'}"
        )


def check_against_dense(
    model: Decoder, outputs: Sequence[RequestOutput], *, kv_dtype: DTypeLike | None = None
) -> DenseCheck:
    """Compares the logits of every generated token with those of a dense forward pass over the whole sequence.

    Where the pool has 8 bits or fewer, the dense pass rounds its keys and values as the pool does.

    Args:
        model: the weights that the answers were generated with.
        outputs: answers generated with ``return_logits=True``.
        kv_dtype: dtype of the pool that they were generated with; None is the model's dtype.

    Raises:
        ConfigError: an answer has no logits.
    """
    graph, weights = nnx.split(model)
    sharding = jax.tree.leaves(weights)[0].sharding
    # Whole on every device, so that every process can read it.
    out = NamedSharding(sharding.mesh, REPLICATED) if isinstance(sharding, NamedSharding) else None
    stored = jnp.dtype(kv_dtype or model.dtype)
    kept = as_computed if stored.name in DTYPES else partial(as_stored, dtype=stored)
    dense = jax.jit(lambda weights, tokens: dense_logits(nnx.merge(graph, weights), tokens, kept), out_shardings=out)
    largest, difference, differs, count, not_finite = 0.0, 0.0, 0, 0, 0
    for output in outputs:
        if not output.token_ids:
            continue
        fed = np.asarray([*output.prompt_token_ids, *output.token_ids[:-1]], np.int32)
        padded = np.zeros(1 << (len(fed) - 1).bit_length(), np.int32)  # causal: padding behind changes nothing
        padded[: len(fed)] = fed
        expected = np.asarray(dense(weights, padded))[len(output.prompt_token_ids) - 1 : len(fed)]
        if output.logits is None:
            raise ConfigError("the answers have no logits; generate them with return_logits=True")
        got = output.logits
        finite = np.isfinite(got) & np.isfinite(expected)
        not_finite += int((~finite).sum())
        largest = max(largest, float(np.abs(expected[finite]).max(initial=0)))
        difference = max(difference, float(np.abs(got[finite] - expected[finite]).max(initial=0)))
        differs += int((got.argmax(-1) != expected.argmax(-1)).sum())
        count += len(got)
    share = max(CHECK_BOUND[jnp.dtype(dtype).name] for dtype in (model.dtype, stored))
    return DenseCheck(count, float("nan") if not_finite else difference, differs, share * largest, not_finite)
