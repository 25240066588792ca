"""Rotary position embedding and its scaling rules.

The rotation is that of RoFormer (Su et al., 2021) in the half-split form of the published Llama weights: element
``i`` of a head turns together with element ``i + D/2``. Scaling rules have the names of Hugging Face configurations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from engine.errors import ConfigError
from engine.models.checked_values import LONGEST_CONTEXT, require_count, require_flag, require_number

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
        require_count("original_max_position_embeddings of rope_type 'llama3'", context, LONGEST_CONTEXT)
        if not self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"invalid model config: low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor} for rope_type 'llama3'"
            )


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): long wavelengths are stretched by ``factor``, short ones kept, and scores sharpened.

    Attributes:
        factor: factor by which the long wavelengths are stretched.
        original_max_position_embeddings: the context in tokens before stretching.
        attention_factor: factor on cosine and sine; see ``yarn_attention_factor``.
        beta_fast: pairs that turn so often in the old context, or more often, are kept.
        beta_slow: pairs that turn so often in the old context, or less often, are stretched fully.
        truncate: whether the two borders between kept and stretched pairs are rounded outward to whole pairs.

    Raises:
        ConfigError: a value is out of range.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        require_number("factor of rope_type 'yarn'", self.factor, least=1, most=_LARGEST_FACTOR)
        for name in ("attention_factor", "beta_fast", "beta_slow"):
            require_number(f"{name} of rope_type 'yarn'", getattr(self, name), least=1e-6, most=_LARGEST_FACTOR)
        context = self.original_max_position_embeddings
        require_count("original_max_position_embeddings of rope_type 'yarn'", context, LONGEST_CONTEXT)
        require_flag("truncate of rope_type 'yarn'", self.truncate)
        if not self.beta_slow <= self.beta_fast:
            raise ConfigError(
                f"invalid model config: beta_slow={self.beta_slow} must be at most beta_fast={self.beta_fast} for "
                "rope_type 'yarn'"
            )


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


class Rope(NamedTuple):
    """What one kind of layer turns its heads by.

    Attributes:
        theta: base of the geometric series of wavelengths.
        scaling: the rule that stretches the wavelengths, or None.
    """

    theta: float
    scaling: RopeScaling | None

    def rotation(self, positions: Array, head_dim: int) -> tuple[Array, Array]:
        """The `rotation` of heads of ``head_dim`` at ``positions[T]``."""
        factor = self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0
        return rotation(positions, inverse_frequencies(head_dim, self.theta, self.scaling), factor)


def yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """The factor on cosine and sine of a YaRN that states none: ``1 + 0.1 ln(factor)``, or the ratio of two such.

    Args:
        factor: factor by which the long wavelengths are stretched.
        mscale: weight of the logarithm above, 0 where it is not given.
        mscale_all_dim: weight of the logarithm below, 0 where it is not given.
    """
    if mscale and mscale_all_dim:
        return (0.1 * mscale * math.log(factor) + 1.0) / (0.1 * mscale_all_dim * math.log(factor) + 1.0)
    return 0.1 * math.log(factor) + 1.0


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
    if isinstance(scaling, YarnScaling):
        return _yarn_frequencies(frequencies, head_dim, theta, scaling)
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: NDArray[np.float32], rule: Llama3Scaling) -> NDArray[np.float32]:
    wavelengths = 2 * math.pi / frequencies
    # 0 where the old context holds at most low_freq_factor wavelengths, 1 where at least high_freq_factor, else linear.
    fit = rule.original_max_position_embeddings / wavelengths
    keep = np.clip((fit - rule.low_freq_factor) / (rule.high_freq_factor - rule.low_freq_factor), 0.0, 1.0)
    return ((1 - keep) * frequencies / rule.factor + keep * frequencies).astype(np.float32)


def _yarn_frequencies(
    frequencies: NDArray[np.float32], head_dim: int, theta: float, rule: YarnScaling
) -> NDArray[np.float32]:
    def pair_that_turns(times: float) -> float:
        """The pair, as a fraction of an index, that turns so often in the old context."""
        wavelength = rule.original_max_position_embeddings / (times * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = pair_that_turns(rule.beta_fast), pair_that_turns(rule.beta_slow)
    if rule.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # 0 for the pairs that are kept, 1 for those that are stretched fully, linear between.
    width = last - first or 1e-3
    stretch = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(width), 0.0, 1.0)
    blended: NDArray[np.float32] = stretch * frequencies / np.float32(rule.factor) + (1 - stretch) * frequencies
    return blended


def rotation(
    positions: Array, inverse_frequency: NDArray[np.float32], attention_factor: float = 1.0
) -> tuple[Array, Array]:
    """Cosine and sine of every pair's angle at every position.

    Args:
        positions: int32 ``[T]``.
        inverse_frequency: float32 ``[D / 2]``, from `inverse_frequencies`.
        attention_factor: factor on both, see `YarnScaling`.

    Returns:
        Two float32 arrays ``[T, 1, D / 2]``, ready to broadcast over heads.
    """
    angles = positions.astype(jnp.float32)[:, None, None] * jnp.asarray(inverse_frequency)[None, None]
    factor = np.float32(attention_factor)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


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
