from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from random_model import jitted_logits, random_model

from engine.models.decoder import Decoder
from engine.models.dense import causal_attention, dense_logits
from engine.models.model_config import AttentionKind, ModelConfig

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
)


def random_tokens(count: int, seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, count), jnp.int32)


def attention_by_loops(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None) -> np.ndarray:
    """Softmax attention one query and head at a time, in float64."""
    out = np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for token in range(q.shape[0]):
        first = 0 if window is None else max(0, token - window + 1)
        for head in range(q.shape[1]):
            seen = slice(first, token + 1)
            scores = k[seen, head // group].astype(np.float64) @ q[token, head] / np.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            out[token, head] = weights @ v[seen, head // group] / weights.sum()
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_dense_attention_is_softmax_attention(heads: int, kv_heads: int, window: int | None) -> None:
    rng = np.random.default_rng(heads)
    q, k, v = (rng.normal(size=(11, n, 16)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    out = causal_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), None, AttentionKind(0.25, window))
    # float32 sums of 16 products of order 1.
    np.testing.assert_allclose(out, attention_by_loops(q, k, v, window), atol=2e-5)


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, tokens = random_model(CONFIG), random_tokens(12)
    changed = tokens.at[7].set((tokens[7] + 1) % CONFIG.vocab_size)
    before, after = jitted_logits(model, tokens), jitted_logits(model, changed)
    # The same products, summed alike: nothing but the masked part differs.
    np.testing.assert_array_equal(before[:7], after[:7])
    assert np.abs(before[7:] - after[7:]).max() > 1e-3


def test_sequences_of_a_batch_do_not_mix() -> None:
    model = random_model(CONFIG)
    batch = random_tokens(30).reshape(2, 3, 5)
    together = jitted_logits(model, batch)
    apart = jnp.stack([jnp.stack([jitted_logits(model, row) for row in rows]) for rows in batch])
    assert together.shape == (2, 3, 5, CONFIG.vocab_size)
    # Products of other sizes may sum in another order.
    np.testing.assert_allclose(together, apart, atol=1e-5)


def test_attend_is_called_once_a_layer_with_the_real_shapes() -> None:
    seen: list[tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []

    def attend(layer_id: int, q: Array, k: Array, v: Array, sinks: Array | None) -> Array:
        seen.append((layer_id, q.shape, k.shape, v.shape))
        return causal_attention(q, k, v, sinks, CONFIG.layer_attention[layer_id])

    hidden = jax.eval_shape(lambda: random_model(CONFIG)(random_tokens(5), jnp.arange(5), attend))
    assert seen == [(layer, (5, 6, 16), (5, 2, 16), (5, 2, 16)) for layer in range(2)]
    assert hidden.shape == (5, CONFIG.hidden_size)


def test_positions_reach_keys_and_queries_but_not_values() -> None:
    model, tokens = random_model(CONFIG), random_tokens(4)
    taken: list[list[Array]] = []

    def attend(layer_id: int, q: Array, k: Array, v: Array, sinks: Array | None) -> Array:
        if layer_id == 0:
            taken.append([q, k, v])
        return q

    for start in (0, 9):
        model(tokens, jnp.arange(start, start + 4), attend)
    (q0, k0, v0), (q9, k9, v9) = taken
    assert np.abs(q0 - q9).max() > 1e-3
    assert np.abs(k0 - k9).max() > 1e-3
    np.testing.assert_array_equal(v0, v9)


@pytest.mark.parametrize("tied", [False, True])
def test_abstract_initialisation_allocates_nothing_and_has_the_same_shapes(tied: bool) -> None:
    config = replace(CONFIG, tie_word_embeddings=tied)
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype="bfloat16", rngs=nnx.Rngs(0)))
    leaves, real = jax.tree.leaves(nnx.state(abstract)), jax.tree.leaves(nnx.state(random_model(config, "bfloat16")))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [(leaf.shape, leaf.dtype) for leaf in real]
    assert (abstract.lm_head is None) == tied


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(dtype: str) -> None:
    exact = random_model(CONFIG)
    rounded = random_model(CONFIG, dtype)
    tokens = random_tokens(16)
    logits, expected = jitted_logits(rounded, tokens), jitted_logits(exact, tokens)
    assert logits.dtype == jnp.float32
    # A few dozen roundings of 2**-8 (bfloat16) each, against the spread of the logits themselves.
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()
    assert np.abs(logits - expected).max() > 0


def test_the_forward_pass_traces_to_the_same_numbers() -> None:
    model, tokens = random_model(CONFIG), random_tokens(9)
    # Fusion may change the order of sums.
    np.testing.assert_allclose(jitted_logits(model, tokens), dense_logits(model, tokens), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_strict_mode_or_width_of_jax_changes_logits(dtype: Any) -> None:
    config = replace(CONFIG, attention_bias=True, tie_word_embeddings=True, max_position_embeddings=64)
    model, tokens = Decoder(config, dtype=dtype, rngs=nnx.Rngs(2)), random_tokens(22, seed=3).reshape(2, 11)
    expected = dense_logits(model, tokens)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        got = dense_logits(model, tokens)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)
