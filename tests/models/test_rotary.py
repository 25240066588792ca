from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import Array

from engine.models.rotary import (
    LinearScaling,
    Llama3Scaling,
    Rope,
    YarnScaling,
    inverse_frequencies,
    rotate,
    rotation,
    yarn_attention_factor,
)


@jax.jit
def jitted_rotation(x: Array, positions: Array, frequencies: Array) -> Array:
    return rotate(x, *rotation(positions, frequencies))


def turned(head: np.ndarray, position: int, frequencies: np.ndarray) -> np.ndarray:
    """Rotary embedding as complex numbers in float64: independent of the code under test."""
    half = head.size // 2
    pairs = head[:half].astype(np.float64) + 1j * head[half:].astype(np.float64)
    pairs = pairs * np.exp(1j * position * frequencies.astype(np.float64))
    return np.concatenate([pairs.real, pairs.imag])


@given(
    seed=st.integers(0, 2**32 - 1),
    half=st.sampled_from([1, 16, 32, 40, 48, 64, 128]),
    positions=st.lists(st.integers(0, 4096), min_size=3, max_size=3),
)
def test_rotation_is_multiplication_by_complex_numbers(seed: int, half: int, positions: list[int]) -> None:
    x = np.random.default_rng(seed).normal(size=(3, 2, 2 * half)).astype(np.float32)
    frequencies = inverse_frequencies(2 * half, 10000.0, None)
    out = jitted_rotation(x, np.asarray(positions, np.int32), frequencies)
    expected = np.stack(
        [[turned(head, at, frequencies) for head in token] for token, at in zip(x, positions, strict=True)]
    )
    # float32 rounds angles near 4096 rad by up to 2.4e-4 rad (half a unit in the last place).
    np.testing.assert_allclose(out, expected, atol=2.5e-4 * np.abs(x).max() * 2)


def test_scores_depend_on_distance_alone() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 64)), jnp.float32) for _ in range(2))
    frequencies = inverse_frequencies(64, 10000.0, None)

    def score(at_q: int, at_k: int) -> float:
        turned_q = rotate(q, *rotation(jnp.array([at_q]), frequencies))
        turned_k = rotate(k, *rotation(jnp.array([at_k]), frequencies))
        return float(jnp.sum(turned_q * turned_k))

    # 64 products of order 1, each off by an angle's rounding at 1,000 rad (3e-5).
    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=5e-3)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=5e-3)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_frequencies_without_scaling_are_the_geometric_series(head_dim: int) -> None:
    expected = [500000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    np.testing.assert_allclose(inverse_frequencies(head_dim, 500000.0, None), expected, rtol=1e-5)


def test_linear_scaling_divides_positions() -> None:
    plain, scaled = (inverse_frequencies(64, 10000.0, rule) for rule in (None, LinearScaling(4.0)))
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)


def llama3_frequency(frequency: float, rule: Llama3Scaling) -> float:
    """The rule as Meta published it, case by case, in float64."""
    wavelength = 2 * math.pi / frequency
    longest_kept = rule.original_max_position_embeddings / rule.high_freq_factor
    shortest_stretched = rule.original_max_position_embeddings / rule.low_freq_factor
    if wavelength < longest_kept:
        return frequency
    if wavelength > shortest_stretched:
        return frequency / rule.factor
    smooth = rule.original_max_position_embeddings / wavelength - rule.low_freq_factor
    smooth /= rule.high_freq_factor - rule.low_freq_factor
    return (1 - smooth) * frequency / rule.factor + smooth * frequency


@given(
    factor=st.floats(1.0, 32.0),
    low=st.floats(0.5, 2.0),
    gap=st.floats(0.5, 8.0),
    context=st.sampled_from([512, 2048, 8192]),
    theta=st.sampled_from([10000.0, 500000.0]),
)
def test_llama3_scaling_is_the_published_rule(
    factor: float, low: float, gap: float, context: int, theta: float
) -> None:
    rule = Llama3Scaling(factor, low, low + gap, context)
    expected = [llama3_frequency(theta ** (-2 * i / 128), rule) for i in range(64)]
    # At the borders of the cases float32 may fall on either side; both formulas are continuous there.
    np.testing.assert_allclose(inverse_frequencies(128, theta, rule), expected, rtol=2e-5)


def yarn_frequency(pair: int, head_dim: int, theta: float, rule: YarnScaling) -> float:
    """The rule of the paper for one pair, in float64, by where the pair lies between the two borders."""

    def border(turns: float) -> float:
        return head_dim / 2 * math.log(rule.original_max_position_embeddings / turns / 2 / math.pi, theta)

    low, high = border(rule.beta_fast), border(rule.beta_slow)
    if rule.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    stretched = min(max((pair - low) / ((high - low) or 1e-3), 0.0), 1.0)
    frequency = theta ** (-2 * pair / head_dim)
    return frequency * (1 - stretched) + frequency / rule.factor * stretched


@given(
    factor=st.floats(1.0, 64.0),
    slow=st.floats(0.5, 4.0),
    gap=st.floats(1.0, 40.0),
    context=st.sampled_from([512, 4096, 32768]),
    theta=st.sampled_from([100.0, 10000.0, 1000000.0]),
    head_dim=st.sampled_from([16, 64, 128]),
    truncate=st.booleans(),
)
def test_yarn_scaling_is_the_published_rule(
    factor: float, slow: float, gap: float, context: int, theta: float, head_dim: int, truncate: bool
) -> None:
    rule = YarnScaling(factor, context, 1.0, beta_fast=slow + gap, beta_slow=slow, truncate=truncate)
    expected = [yarn_frequency(pair, head_dim, theta, rule) for pair in range(head_dim // 2)]
    # float32 rounds the share of a pair between the borders, which is stretched by up to 64.
    np.testing.assert_allclose(inverse_frequencies(head_dim, theta, rule), expected, rtol=1e-4)


def test_yarn_keeps_the_first_pairs_stretches_the_last_and_sharpens_all() -> None:
    rule = YarnScaling(8.0, 4096, 1.25)
    plain, scaled = (inverse_frequencies(128, 10000.0, each) for each in (None, rule))
    np.testing.assert_allclose(scaled[:8], plain[:8], rtol=1e-6)
    np.testing.assert_allclose(scaled[-8:], plain[-8:] / 8, rtol=1e-6)
    for scaling, size in ((rule, 1.25), (None, 1.0)):
        cos, sin = Rope(10000.0, scaling).rotation(jnp.arange(5), 128)
        np.testing.assert_allclose(cos**2 + sin**2, size**2, rtol=1e-5)


def test_the_attention_factor_of_yarn_follows_from_its_factor() -> None:
    assert yarn_attention_factor(1.0) == 1.0
    assert yarn_attention_factor(32.0) == pytest.approx(1.3465735902799727)  # that of gpt-oss
    assert yarn_attention_factor(40.0, 1.0, 1.0) == 1.0  # a ratio of equals
    assert yarn_attention_factor(32.0, 1.0) == yarn_attention_factor(32.0)  # one of the two weights is none


def test_rotation_keeps_the_dtype_of_what_it_turns() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 64)), jnp.bfloat16)
    assert rotate(x, *rotation(jnp.array([3, 900]), inverse_frequencies(64, 10000.0, None))).dtype == jnp.bfloat16
