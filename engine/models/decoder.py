"""A decoder in flax nnx, put together from shared parts as its family's description says (`families`).

Compatible with the weights of Hugging Face. The model holds no cache: attention is a function that the caller passes
in, so the same forward pass runs over a paged pool, densely, or in training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from engine.models.experts import MixtureOfExperts
from engine.models.linear import linear, precision
from engine.models.mlp import MLP
from engine.models.model_config import ModelConfig
from engine.models.norm import RMSNorm
from engine.models.self_attention import Attend, Attention

Place = Callable[[Array], Array]
"""Returns ``[T, hidden]`` activations with a sharding over a mesh."""

_INIT = nnx.initializers.normal(0.02)


class DecoderLayer(nnx.Module):
    """One layer: attention, then MLP or experts, each after a norm and added to the residual stream.

    Where the family has norms behind the two as well, ``post_attention_layernorm`` is the one behind attention, and the
    one before the MLP is ``pre_feedforward_layernorm``; these are the names in the checkpoints.

    Args:
        config: the model's geometry.
        layer_id: index of the layer, from 0.
        dtype: dtype of weights and activations.
        rngs: random state for the initial weights.
    """

    def __init__(self, config: ModelConfig, layer_id: int, dtype: Any, rngs: nnx.Rngs) -> None:
        hidden, sandwich = config.hidden_size, config.family.sandwich_norms
        self.input_layernorm = RMSNorm(config, hidden, dtype)
        self.self_attn = Attention(config, layer_id, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config, hidden, dtype)
        self.pre_feedforward_layernorm = RMSNorm(config, hidden, dtype) if sandwich else None
        self.mlp = (MixtureOfExperts if config.family.experts else MLP)(config, dtype, rngs)
        self.post_feedforward_layernorm = RMSNorm(config, hidden, dtype) if sandwich else None

    def __call__(self, x: Array, cos: Array, sin: Array, attend: Attend) -> Array:
        """``x[T, hidden] -> [T, hidden]``."""
        attended = self.self_attn(self.input_layernorm(x), cos, sin, attend)
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


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
        self.norm = RMSNorm(config, config.hidden_size, dtype)
        self.lm_head: nnx.Linear | None = (
            None if config.tie_word_embeddings else linear(config.hidden_size, config.vocab_size, dtype, rngs)
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
        x = self.embed_tokens(token_ids)
        if config.family.scaled_embedding:
            x = x * jnp.asarray(config.hidden_size**0.5, self.dtype)  # the factor is rounded first, as in training
        x = place(x)
        ropes = config.layer_ropes
        rotations = {rope: rope.rotation(positions, config.head_dim) for rope in dict.fromkeys(ropes)}
        for layer, rope in zip(self.layers, ropes, strict=True):
            x = place(layer(x, *rotations[rope], attend))
        return self.norm(x)

    def logits(self, hidden: Array) -> Array:
        """The logits of the next token: ``hidden[N, hidden_size] -> float32[N, vocab_size]``."""
        kernel = self.embed_tokens.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        logits = jnp.matmul(hidden, kernel, precision=precision(self.dtype), preferred_element_type=jnp.float32)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)
