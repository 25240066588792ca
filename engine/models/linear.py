"""Linear layers in the precision of their dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def linear(inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs, *, bias: bool = False) -> nnx.Linear:
    """``[T, inputs] -> [T, outputs]`` in ``dtype``, which is also that of its weights."""
    return nnx.Linear(
        inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=dtype, precision=precision(dtype), rngs=rngs
    )


def precision(dtype: Any) -> jax.lax.Precision | None:
    """On a TPU the default precision of a float32 product is bfloat16; 16-bit dtypes have only one precision."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
