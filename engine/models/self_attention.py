"""The projections around attention; attention itself is a function that the caller of the model passes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from engine.models.linear import linear
from engine.models.model_config import ModelConfig
from engine.models.norm import RMSNorm
from engine.models.rotary import rotate

Attend = Callable[[int, Array, Array, Array, Array | None], Array]
"""``attend(layer_id, q[T, Hq, D], k[T, H, D], v[T, H, D], sinks[Hq] or None) -> out[T, Hq, D]``; q and k come rotated.

What else attention needs of a layer, which is fixed, is in ``ModelConfig.layer_attention``.
"""


class Attention(nnx.Module):
    """Queries, keys and values of one layer, normalised where the family does, and the projection of what they attend.

    Args:
        config: the model's geometry.
        layer_id: index of the layer, from 0, passed to `Attend`.
        dtype: dtype of weights and activations.
        rngs: random state for the initial weights.
    """

    def __init__(self, config: ModelConfig, layer_id: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.layer_id = layer_id
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(hidden, q_width, dtype, rngs, bias=bias)
        self.k_proj = linear(hidden, kv_width, dtype, rngs, bias=bias)
        self.v_proj = linear(hidden, kv_width, dtype, rngs, bias=bias)
        self.o_proj = linear(q_width, hidden, dtype, rngs, bias=config.output_bias)
        family = config.family
        self.q_norm = RMSNorm(config, config.head_dim, dtype) if family.qk_norm else None
        self.k_norm = RMSNorm(config, config.head_dim, dtype) if family.qk_norm else None
        self.sinks = nnx.Param(jnp.zeros(config.num_attention_heads, dtype)) if family.sinks else None

    def __call__(self, x: Array, cos: Array, sin: Array, attend: Attend) -> Array:
        """Attends: ``x[T, hidden]``, ``cos`` and ``sin`` ``[T, 1, D / 2]`` -> ``[T, hidden]``."""
        q, k, v = (
            projection(x).reshape(x.shape[0], -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        sinks = None if self.sinks is None else self.sinks[...]
        out = attend(self.layer_id, rotate(q, cos, sin), rotate(k, cos, sin), v, sinks)
        return self.o_proj(out.reshape(x.shape[0], -1))
