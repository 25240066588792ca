"""Where models of 16 bits round: each family's norm, and the factor on embeddings, as the weights were trained."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from random_model import random_model
from tiny_families import tiny

from engine.models.model_config import ModelConfig
from engine.models.norm import RMSNorm

WIDTH = 512
BF16 = jnp.bfloat16


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(BF16).astype(np.float32)


def norm_of(model_type: str, x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """In float32, rounded where the family rounds; ``x`` and ``weight`` hold bfloat16 numbers."""
    normal = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + epsilon).astype(np.float32)
    if model_type in ("gemma2", "gemma3_text"):
        return rounded(normal * (1 + weight))
    return rounded(normal * weight) if model_type == "gpt_oss" else rounded(rounded(normal) * weight)


@pytest.mark.parametrize("model_type", ["mistral", "qwen3", "gpt_oss", "gemma2", "gemma3_text"])
def test_a_norm_rounds_where_its_family_does(model_type: str) -> None:
    config = ModelConfig(**tiny(model_type))
    rng = np.random.default_rng()
    x, weight = (rounded(rng.normal(1, 0.5, shape).astype(np.float32)) for shape in ((64, WIDTH), WIDTH))
    norm = RMSNorm(config, WIDTH, BF16)
    norm.scale[...] = jnp.asarray(weight, BF16)
    got = np.asarray(norm(jnp.asarray(x, BF16))).astype(np.float32)
    # A number that lies at the middle of two may round to either, by the last bit of a float32.
    unlike = {name: (got != norm_of(name, x, weight, config.rms_norm_eps)).mean() for name in ("mistral", "gpt_oss")}
    assert (got != norm_of(model_type, x, weight, config.rms_norm_eps)).mean() < 1e-3
    other = "gpt_oss" if model_type in ("mistral", "qwen3") else "mistral"
    assert unlike[other] > 0.1


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_the_factor_on_embeddings_is_rounded_before_it_multiplies(model_type: str) -> None:
    config = ModelConfig(**tiny(model_type, hidden_size=5376))
    model = random_model(config, "bfloat16")
    seen: list[np.ndarray] = []

    def place(hidden: jnp.ndarray) -> jnp.ndarray:
        seen.append(np.asarray(hidden).astype(np.float32))
        return hidden

    tokens = jnp.arange(8)
    model(tokens, tokens, lambda layer_id, q, k, v, sinks: q, place)
    embedding = np.asarray(model.embed_tokens.embedding[...]).astype(np.float32)[:8]
    np.testing.assert_array_equal(seen[0], rounded(embedding * np.float32(73.5)))  # sqrt(5376) is 73.32
