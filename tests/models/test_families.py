"""Each family against its forward pass in float64, from the file that was saved: names, layouts and arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_forward import Forward
from random_model import jitted_logits, random_model
from safetensors.numpy import load_file
from tiny_families import TINY, tiny

from engine import LLM, SamplingParams
from engine.models.checkpoint import load_model, save_model
from engine.models.decoder import Decoder
from engine.models.experts import Experts, routing_weights
from engine.models.model_config import ModelConfig
from engine.serving.check import check_against_dense

TOKENS = 40
MOST_UNLIKE = ("gemma3_text", "gpt_oss")  # between them, every feature but the soft cap of scores


def random_of(model_type: str, dtype: str = "float32") -> Decoder:
    return random_model(ModelConfig(**tiny(model_type)), dtype, seed=int(np.random.default_rng().integers(1 << 30)))


def oracle_of(model: Decoder, directory: Path) -> Forward:
    save_model(model, directory)
    return Forward(load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text()))


@pytest.mark.parametrize("model_type", TINY)
def test_logits_are_those_of_float64(tmp_path: Path, model_type: str) -> None:
    model = random_of(model_type)
    tokens = np.random.default_rng().integers(0, model.config.vocab_size, TOKENS)
    expected = oracle_of(model, tmp_path).logits(tokens.tolist())
    got = jitted_logits(model, tokens.astype(np.int32))
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


CHANGES = {
    "every window": {"sliding_window": 6},
    "a layer's kind": {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    "scale": {"query_pre_attn_scalar": 13},
    "base": {"rope_theta": 98.0},
    "local base": {"rope_local_base_freq": 110.0},
    "soft cap of scores": {"attn_logit_softcapping": 1.4},
    "soft cap of logits": {"final_logit_softcapping": 3.9},
    "clip": {"swiglu_limit": 0.75},
    "gain": {"swiglu_alpha": 1.6},
    "chosen": {"num_experts_per_tok": 3},
}


@pytest.mark.parametrize("model_type", TINY)
def test_the_comparison_with_float64_tells_every_setting(tmp_path: Path, model_type: str) -> None:
    model = random_of(model_type)
    tokens = np.random.default_rng().integers(0, model.config.vocab_size, TOKENS)
    oracle = oracle_of(model, tmp_path)
    written = dict(oracle.config)
    expected = oracle.logits(tokens.tolist())
    for name, change in CHANGES.items():
        if all(key in written and written[key] is not None for key in change):
            oracle.config = written | change
            difference = np.abs(oracle.logits(tokens.tolist()) - expected).max()
            assert difference > 1e-3 * np.abs(expected).max(), name


@pytest.mark.parametrize("model_type", TINY)
def test_what_is_saved_loads_back(tmp_path: Path, model_type: str) -> None:
    model = random_of(model_type, "bfloat16")
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, dtype="bfloat16")
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves(jax.device_get(m)) for m in states(loaded, model)))


def states(*models: Decoder) -> list[object]:
    from flax import nnx

    return [nnx.to_pure_dict(nnx.state(model)) for model in models]


@pytest.mark.parametrize("model_type", TINY)
def test_half_precision_stays_near_float32(model_type: str) -> None:
    config = ModelConfig(**tiny(model_type))
    tokens = np.random.default_rng().integers(0, config.vocab_size, TOKENS).astype(np.int32)
    exact, rounded = (jitted_logits(random_model(config, dtype), tokens) for dtype in ("float32", "bfloat16"))
    # Some dozen roundings of 2**-9 each; a router may choose another expert for a token that is undecided.
    assert np.quantile(np.abs(exact - rounded), 0.95) < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in MOST_UNLIKE else pytest.mark.slow) for name in TINY]
)
def test_served_in_chunks_and_warm_the_logits_are_the_dense_ones(model_type: str) -> None:
    model = random_of(model_type)
    rng = np.random.default_rng()
    prompts = [rng.integers(0, model.config.vocab_size, length).tolist() for length in (2, 60, 21)]
    llm = LLM(model, page_size=4, max_running_requests=4, chunked_prefill_size=16)
    for cached in (False, True):
        outputs = llm.generate(prompts, SamplingParams(max_new_tokens=6), return_logits=True)
        assert (outputs[1].cached_tokens > 0) == cached
        check = check_against_dense(model, outputs)
        assert check.passed, check.describe()


def test_a_tokens_mixture_is_bitwise_the_same_whatever_is_beside_it() -> None:
    config = ModelConfig(**tiny("gpt_oss"))
    mixture = random_model(config).layers[0].mlp
    rng = np.random.default_rng()
    tokens = rng.normal(size=(12, config.hidden_size)).astype(np.float32)
    others = rng.normal(size=tokens.shape).astype(np.float32) * 100
    others[5] = tokens[5]
    one, other = (jax.jit(mixture)(jnp.asarray(batch))[5] for batch in (tokens, others))
    np.testing.assert_array_equal(one, other)


def test_an_expert_that_was_not_chosen_adds_nothing_even_where_it_overflows() -> None:
    config = ModelConfig(**tiny("gpt_oss"))
    experts: Experts = random_model(config).layers[0].mlp.experts
    x = jnp.asarray(np.random.default_rng().normal(size=(3, config.hidden_size)), jnp.float32)
    weights = jnp.zeros((3, 8)).at[:, 1].set(1.0)
    expected = experts(x, weights)
    experts.gate_up_proj[...] = experts.gate_up_proj[...].at[4].set(jnp.nan)
    np.testing.assert_array_equal(experts(x, weights), expected)


def test_routing_weights_are_a_softmax_over_the_chosen_experts() -> None:
    logits = np.random.default_rng().normal(size=(9, 7)).astype(np.float32)
    weights = np.asarray(routing_weights(jnp.asarray(logits), 3))
    for row, got in zip(logits.astype(np.float64), weights, strict=True):
        chosen = np.argsort(-row)[:3]
        expected = np.zeros(7)
        expected[chosen] = np.exp(row[chosen]) / np.exp(row[chosen]).sum()
        np.testing.assert_allclose(got, expected, atol=1e-6)
