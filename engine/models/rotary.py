"""Rotary position embedding and its scaling rules.

The rotation is that of RoFormer (Su et al., 2021) in the half-split form of the published Llama weights: element
``i`` of a head turns together with element ``i + D/2``. Scaling rules have the names of Hugging Face configurations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from engine.errors import ConfigError
from engine.models.checked_values import require_count, require_number

_LARGEST_FACTOR = 1e6


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al., 2023): every frequency is divided by ``factor``.

    Raises:
        ConfigError: the factor is not a number of at least 1.
    """

    factor: float

    def __post_init__(self) -> None:
        require_number("factor of rope_type 'linear'", self.factor, least=1, most=_LARGEST_FACTOR)


@dataclass(frozen=True)
class Llama3Scaling:
    """The rule of Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between blended.

    Attributes:
        factor: factor by which the long wavelengths are stretched.
        low_freq_factor: wavelengths above ``original_max_position_embeddings / low_freq_factor`` are stretched fully.
        high_freq_factor: wavelengths below ``original_max_position_embeddings / high_freq_factor`` are kept.
        original_max_position_embeddings: the context in tokens before stretching.

    Raises:
        ConfigError: a value is out of range.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        require_number("factor of rope_type 'llama3'", self.factor, least=1, most=_LARGEST_FACTOR)
        for name in ("low_freq_factor", "high_freq_factor"):
            require_number(f"{name} of rope_type 'llama3'", getattr(self, name), least=1e-6, most=_LARGEST_FACTOR)
        context = self.original_max_position_embeddings
        require_count("original_max_position_embeddings of rope_type 'llama3'", context, (1 << 31) - 1)
        if not self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"invalid model config: low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor} for rope_type 'llama3'"
            )


RopeScaling = LinearScaling | Llama3Scaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> NDArray[np.float32]:
    """The angle in radians by which each pair of a head turns per position.

    Args:
        head_dim: elements per head, even.
        theta: base of the geometric series of wavelengths.
        scaling: the rule that stretches the wavelengths, or None.

    Returns:
        float32 ``[head_dim / 2]``, host memory.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        return (frequencies / np.float32(scaling.factor)).astype(np.float32)
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: NDArray[np.float32], rule: Llama3Scaling) -> NDArray[np.float32]:
    wavelengths = 2 * math.pi / frequencies
    # 0 where the old context holds at most low_freq_factor wavelengths, 1 where at least high_freq_factor, else linear.
    fit = rule.original_max_position_embeddings / wavelengths
    keep = np.clip((fit - rule.low_freq_factor) / (rule.high_freq_factor - rule.low_freq_factor), 0.0, 1.0)
    return ((1 - keep) * frequencies / rule.factor + keep * frequencies).astype(np.float32)


def rotation(positions: Array, inverse_frequency: NDArray[np.float32]) -> tuple[Array, Array]:
    """Cosine and sine of every pair's angle at every position.

    Args:
        positions: int32 ``[T]``.
        inverse_frequency: float32 ``[D / 2]``, from `inverse_frequencies`.

    Returns:
        Two float32 arrays ``[T, 1, D / 2]``, ready to broadcast over heads.
    """
    angles = positions.astype(jnp.float32)[:, None, None] * jnp.asarray(inverse_frequency)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns every head of ``x`` by its position's angles, computed in float32.

    Args:
        x: queries or keys, ``[T, heads, D]``.
        cos: float32 ``[T, 1, D / 2]``, from `rotation`.
        sin: float32 ``[T, 1, D / 2]``, from `rotation`.

    Returns:
        ``[T, heads, D]`` in x's dtype.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
