"""Recomputes generated tokens with dense attention over unfused K and V: no pool, no pages, no fused layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from engine.errors import ConfigError
from engine.models.dense import dense_logits
from engine.models.llama import Llama
from engine.parallel import REPLICATED
from engine.serving.request import RequestOutput

# In float32 the two differ by the order of sums alone. In 16 bits every layer rounds its activations (8 and 11 bits
# of mantissa), and logits of size 10 to 20 inherit a few such roundings.
CHECK_BOUND = {"float32": 1e-4, "float16": 0.1, "bfloat16": 0.75}


@dataclass(frozen=True)
class DenseCheck:
    """How the engine's logits compare with the dense ones.

    Attributes:
        tokens: generated tokens compared.
        largest_difference: largest absolute difference of any logit.
        argmax_differs: tokens whose best dense logit is another token's.
        bound: largest difference that the dtypes of model and pool explain.
    """

    tokens: int
    largest_difference: float
    argmax_differs: int
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the bound; NaN is not."""
        return self.largest_difference <= self.bound


def check_against_dense(
    model: Llama, outputs: Sequence[RequestOutput], *, kv_dtype: DTypeLike | None = None
) -> DenseCheck:
    """Compares the logits of every generated token with those of a dense forward over the whole sequence.

    Args:
        model: the weights that generated.
        outputs: answers generated with ``return_logits=True``.
        kv_dtype: of the pool that generated; None is the model's.

    Raises:
        ConfigError: an answer carries no logits.
    """
    graph, weights = nnx.split(model)
    sharding = jax.tree.leaves(weights)[0].sharding
    # Whole on every device, so that every process can read it.
    out = NamedSharding(sharding.mesh, REPLICATED) if isinstance(sharding, NamedSharding) else None
    dense = jax.jit(lambda weights, tokens: dense_logits(nnx.merge(graph, weights), tokens), out_shardings=out)
    differences, differs, count = [0.0], 0, 0
    for output in outputs:
        fed = np.asarray([*output.prompt_token_ids, *output.token_ids[:-1]], np.int32)
        padded = np.zeros(1 << (len(fed) - 1).bit_length(), np.int32)  # causal: what follows changes nothing before
        padded[: len(fed)] = fed
        expected = np.asarray(dense(weights, padded))[len(output.prompt_token_ids) - 1 : len(fed)]
        if output.logits is None:
            raise ConfigError("the answers carry no logits; generate them with return_logits=True")
        got = output.logits
        differences.append(float(np.abs(got - expected).max()))
        differs += int((got.argmax(-1) != expected.argmax(-1)).sum())
        count += len(got)
    bound = max(CHECK_BOUND[jnp.dtype(dtype).name] for dtype in (model.dtype, kv_dtype or model.dtype))
    # np.max keeps a NaN, which Python's max may lose
    return DenseCheck(count, float(np.max(differences)), differs, bound)
