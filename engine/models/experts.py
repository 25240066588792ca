"""A mixture of experts as in gpt-oss: a router chooses some experts for each token and weighs what they answer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from engine.models.linear import linear, precision
from engine.models.model_config import ModelConfig

_INIT = nnx.initializers.normal(0.02)


class Experts(nnx.Module):
    """The weights of all experts, each a clamped SwiGLU with biases.

    Every expert computes every token, and a token's answer counts only those that its router chose. So shapes are
    static, no token's result depends on the others, each weight is read once a step whatever the routing, and over a
    mesh there is one sum over the devices per layer. The price is ``experts / chosen`` times the arithmetic, which a
    step of few tokens does not notice, since reading the weights takes longer; and ``E * T * 2 * intermediate``
    activations. To gather the chosen experts' weights instead would copy them once for every token.

    Args:
        config: the model's geometry.
        dtype: dtype of weights and activations.
        rngs: random state for the initial weights.
    """

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        experts, hidden, width = config.num_local_experts, config.hidden_size, config.intermediate_size

        def weight(*shape: int) -> nnx.Param[Array]:
            return nnx.Param(_INIT(rngs.params(), shape, dtype))

        # The gate's columns are the even ones, those of the other half the odd ones, as published.
        self.gate_up_proj = weight(experts, hidden, 2 * width)
        self.gate_up_proj_bias = nnx.Param(jnp.zeros((experts, 2 * width), dtype))
        self.down_proj = weight(experts, width, hidden)
        self.down_proj_bias = nnx.Param(jnp.zeros((experts, hidden), dtype))

    def __call__(self, x: Array, weights: Array) -> Array:
        """The sum of the experts' answers.

        Args:
            x: ``[T, hidden]``.
            weights: float32 ``[T, E]``, 0 where an expert was not chosen.

        Returns:
            ``[T, hidden]`` in x's dtype.
        """
        exact = precision(x.dtype)
        both = jnp.einsum("th,ehj->tej", x, self.gate_up_proj[...], precision=exact)
        both = both + self.gate_up_proj_bias[...][None]
        pairs = both.reshape(*both.shape[:2], -1, 2)
        gate = jnp.minimum(pairs[..., 0], self.limit)
        up = jnp.clip(pairs[..., 1], -self.limit, self.limit)
        inner = (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)
        # An expert that was not chosen may overflow, so its part is dropped rather than multiplied by 0.
        share = weights[..., None]
        inner = jnp.where(share > 0, inner.astype(jnp.float32) * share, jnp.float32(0)).astype(x.dtype)
        out = jnp.einsum("tei,eih->th", inner, self.down_proj[...], precision=exact, preferred_element_type=jnp.float32)
        bias = self.down_proj_bias[...].astype(jnp.float32)
        out = out + jnp.matmul(weights, bias, precision=jax.lax.Precision.HIGHEST)
        return out.astype(x.dtype)


class MixtureOfExperts(nnx.Module):
    """The router and its experts.

    Args:
        config: the model's geometry.
        dtype: dtype of weights and activations.
        rngs: random state for the initial weights.
    """

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.chosen = config.num_experts_per_tok
        self.router = linear(config.hidden_size, config.num_local_experts, dtype, rngs, bias=True)
        self.experts = Experts(config, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        """``x[T, hidden] -> [T, hidden]``."""
        return self.experts(x, routing_weights(self.router(x), self.chosen))


def routing_weights(logits: Array, chosen: int) -> Array:
    """Softmax over each token's ``chosen`` largest logits: ``[T, E]`` -> float32 ``[T, E]``, 0 for the other ones."""
    best, experts = jax.lax.top_k(logits.astype(jnp.float32), chosen)
    shares = jax.nn.softmax(best, axis=-1)
    one_hot = jax.nn.one_hot(experts, logits.shape[-1], dtype=jnp.float32)
    return jnp.sum(one_hot * shares[..., None], axis=1)
