"""The gated MLP that every token goes through."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax import Array

from engine.models.linear import linear
from engine.models.model_config import ModelConfig


class MLP(nnx.Module):
    """A gated MLP (Shazeer, 2020): SwiGLU, or GeGLU in the approximation by tanh.

    Args:
        config: the model's geometry.
        dtype: dtype of weights and activations.
        rngs: random state for the initial weights.
    """

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.activation = config.family.activation
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, dtype, rngs)
        self.up_proj = linear(config.hidden_size, config.intermediate_size, dtype, rngs)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        """``x[T, hidden] -> [T, hidden]``."""
        gate = self.gate_proj(x)
        gate = jax.nn.silu(gate) if self.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        return self.down_proj(gate * self.up_proj(x))
