"""The Llama family in flax nnx: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

Compatible with the Llama 2 and 3, Mistral and Qwen2 weights of Hugging Face. The model holds no cache: attention is
a function that the caller passes in, so the same forward pass runs over a paged pool, densely, or in training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from engine.models.model_config import ModelConfig
from engine.models.rotary import inverse_frequencies, rotate, rotation

Attend = Callable[[int, Array, Array, Array], Array]
"""``attend(layer_id, q[T, Hq, D], k[T, H, D], v[T, H, D]) -> out[T, Hq, D]``; q and k come rotated."""

Place = Callable[[Array], Array]
"""Returns ``[T, hidden]`` activations with a sharding over a mesh."""

_INIT = nnx.initializers.normal(0.02)


def _linear(inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs, *, bias: bool = False) -> nnx.Linear:
    # On a TPU the default precision of a float32 product is bfloat16; for 16-bit dtypes there is only one precision.
    return nnx.Linear(
        inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=dtype, precision=_precision(dtype), rngs=rngs
    )


def _precision(dtype: Any) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (Zhang & Sennrich, 2019); the statistics are float32.

    Args:
        config: has the width and epsilon.
        dtype: dtype of the weight.
    """

    def __init__(self, config: ModelConfig, dtype: Any) -> None:
        self.epsilon = config.rms_norm_eps
        self.scale = nnx.Param(jnp.ones(config.hidden_size, dtype))

    def __call__(self, x: Array) -> Array:
        """Normalises the last axis of ``x``; returns the same shape and dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return wide.astype(x.dtype) * jnp.broadcast_to(self.scale[...], x.shape)


class Attention(nnx.Module):
    """The projections around attention; attention itself is the caller's `Attend`.

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
        self.q_proj = _linear(hidden, q_width, dtype, rngs, bias=bias)
        self.k_proj = _linear(hidden, kv_width, dtype, rngs, bias=bias)
        self.v_proj = _linear(hidden, kv_width, dtype, rngs, bias=bias)
        self.o_proj = _linear(q_width, hidden, dtype, rngs, bias=config.output_bias)

    def __call__(self, x: Array, cos: Array, sin: Array, attend: Attend) -> Array:
        """Attends: ``x[T, hidden]``, ``cos`` and ``sin`` ``[T, 1, D / 2]`` -> ``[T, hidden]``."""
        q, k, v = (
            projection(x).reshape(x.shape[0], -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(self.layer_id, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.reshape(x.shape[0], -1))


class MLP(nnx.Module):
    """SwiGLU (Shazeer, 2020).

    Args:
        config: the model's geometry.
        dtype: dtype of weights and activations.
        rngs: random state for the initial weights.
    """

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size, dtype, rngs)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size, dtype, rngs)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        """``x[T, hidden] -> [T, hidden]``."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """One layer: attention, then MLP, each after a norm and added to the residual stream.

    Args:
        config: the model's geometry.
        layer_id: index of the layer, from 0.
        dtype: dtype of weights and activations.
        rngs: random state for the initial weights.
    """

    def __init__(self, config: ModelConfig, layer_id: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config, dtype)
        self.self_attn = Attention(config, layer_id, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(self, x: Array, cos: Array, sin: Array, attend: Attend) -> Array:
        """``x[T, hidden] -> [T, hidden]``."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """A decoder-only language model; submodules are named as the tensors of its Hugging Face checkpoint.

    Nothing here depends on the weights' values, so `nnx.eval_shape` builds the model without allocating them.

    Args:
        config: the model's geometry.
        dtype: dtype of weights and activations: float32, bfloat16 or float16.
        rngs: random state for the initial weights.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = jnp.dtype(dtype)
        dtype = self.dtype
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, embedding_init=_INIT, rngs=rngs
        )
        self.layers = nnx.List(
            [DecoderLayer(config, layer_id, dtype, rngs) for layer_id in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config, dtype)
        self.lm_head: nnx.Linear | None = (
            None if config.tie_word_embeddings else _linear(config.hidden_size, config.vocab_size, dtype, rngs)
        )

    def __call__(
        self, token_ids: Array, positions: Array, attend: Attend, place: Place = lambda hidden: hidden
    ) -> Array:
        """Runs the layers over a flat run of tokens, which may belong to several sequences.

        Args:
            token_ids: int32 ``[T]``.
            positions: int32 ``[T]``, each token's position in its own sequence, from 0.
            attend: attention; called once per layer, in order; it may collect what it writes in a closure.
            place: called on the residual stream after the embedding and each layer; the identity by default.

        Returns:
            Hidden states after the final norm, ``[T, hidden_size]``, in the model's dtype.
        """
        config = self.config
        cos, sin = rotation(positions, inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))
        x = place(self.embed_tokens(token_ids))
        for layer in self.layers:
            x = place(layer(x, cos, sin, attend))
        return self.norm(x)

    def logits(self, hidden: Array) -> Array:
        """The logits of the next token: ``hidden[N, hidden_size] -> float32[N, vocab_size]``."""
        kernel = self.embed_tokens.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        return jnp.matmul(hidden, kernel, precision=_precision(self.dtype), preferred_element_type=jnp.float32)
