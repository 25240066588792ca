"""Root-mean-square normalisation, in the styles of the families."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from engine.models.model_config import ModelConfig


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (Zhang & Sennrich, 2019); the statistics are float32.

    Args:
        config: has the epsilon, and by its family what is multiplied and where it is rounded.
        width: elements of the last axis.
        dtype: dtype of the weight.
    """

    def __init__(self, config: ModelConfig, width: int, dtype: Any) -> None:
        self.epsilon = config.rms_norm_eps
        self.from_one = config.family.norm_from_one
        self.scales_wide = config.family.norm_scales_wide
        self.scale = nnx.Param((jnp.zeros if self.from_one else jnp.ones)(width, dtype))

    def __call__(self, x: Array) -> Array:
        """Normalises the last axis of ``x``; returns the same shape and dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        computed = jnp.float32 if self.scales_wide else x.dtype
        weight = self.scale[...].astype(computed)
        weight = 1 + weight if self.from_one else weight
        return (wide.astype(computed) * jnp.broadcast_to(weight, x.shape)).astype(x.dtype)
