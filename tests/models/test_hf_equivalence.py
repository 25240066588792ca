"""The same checkpoints in transformers and here: an implementation by others is the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import (
    GEOMETRY,
    LINEAR_ROPE,
    LLAMA3_ROPE,
    UNLIKE,
    WINDOW,
    YARN_ROPE,
    hf_greedy,
    hf_logits,
    hf_model,
    save,
    torch,
    transformers,
)
from numpy.typing import NDArray
from random_model import jitted_logits, random_model

from engine.models.checkpoint import load_config, load_model, save_model
from engine.models.model_config import ModelConfig
from engine.models.rotary import inverse_frequencies

# Their deprecations are not ours to fix, and the suite turns warnings into errors.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "MHA with biases": ("Llama", {"num_key_value_heads": 4, "attention_bias": True}),
    "MQA, own head_dim": ("Llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear rope": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "other theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "qwen2": ("Qwen2", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": WINDOW}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN_ROPE}),
    "qwen2, yarn with a factor of its own": ("Qwen2", {"rope_parameters": YARN_ROPE | {"attention_factor": 0.9}}),
    "llama, yarn by mscale": ("Llama", {"rope_parameters": YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
    **UNLIKE,
}
PROMPT_TOKENS, NEW_TOKENS = 40, 12


def our_greedy(directory: Path, tokens: NDArray[np.int64]) -> list[int]:
    model = load_model(directory, dtype="float32")
    # Padding behind a causal model's tokens changes nothing before it, and one length compiles once.
    padded = np.zeros(len(tokens) + NEW_TOKENS, np.int32)
    padded[: len(tokens)] = tokens
    for end in range(len(tokens), len(padded)):
        padded[end] = int(jnp.argmax(jitted_logits(model, padded)[end - 1]))
    return [int(token) for token in padded[len(tokens) :]]


def random_prompt() -> NDArray[np.int64]:
    return np.random.default_rng(5).integers(0, GEOMETRY["vocab_size"], PROMPT_TOKENS)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_transformers_gives_the_same_logits_and_greedy_tokens(tmp_path: Path, case: str) -> None:
    model = hf_model(*CASES[case])
    save(model, tmp_path)
    tokens = random_prompt()
    ours = np.asarray(jitted_logits(load_model(tmp_path, dtype="float32"), tokens.astype(np.int32)))
    # The bar of the whole subsystem in float32; the logits' spread here is of order 1.
    np.testing.assert_allclose(ours, hf_logits(model, tokens), atol=1e-4, rtol=0)
    assert our_greedy(tmp_path, tokens) == hf_greedy(model, tokens, NEW_TOKENS)


def test_a_sharded_checkpoint_of_transformers_gives_the_same_logits(tmp_path: Path) -> None:
    model = hf_model("Llama", {})
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    tokens = random_prompt()
    ours = np.asarray(jitted_logits(load_model(tmp_path, dtype="float32"), tokens.astype(np.int32)))
    np.testing.assert_allclose(ours, hf_logits(model, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [{}, {"model_type": "qwen2", "attention_bias": True}, {"model_type": "mistral", "layer_windows": (7, 7)}],
    ids=["llama", "qwen2", "mistral"],
)
def test_transformers_reads_what_is_saved_here(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = ModelConfig(**GEOMETRY | {"head_dim": 16} | changes)
    model = random_model(config)
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = random_prompt()
    ours = np.asarray(jitted_logits(model, tokens.astype(np.int32)))
    np.testing.assert_allclose(ours, hf_logits(theirs, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
@pytest.mark.parametrize(
    "left_out", [(), *((key,) for key in GEOMETRY), tuple(GEOMETRY)], ids=["none", *GEOMETRY, "all"]
)
def test_what_a_config_leaves_out_is_what_transformers_assumes(family: str, left_out: tuple[str, ...]) -> None:
    given = {key: value for key, value in GEOMETRY.items() if key not in left_out}
    if "num_attention_heads" in left_out or "hidden_size" in left_out:
        given["head_dim"] = 16
    theirs = getattr(transformers, f"{family}Config")(**given)
    if theirs.num_attention_heads % theirs.num_key_value_heads:
        pytest.skip("no model")
    ours = ModelConfig.from_hf({"model_type": family.lower()} | given)
    for name in (*GEOMETRY, "rms_norm_eps", "tie_word_embeddings", "bos_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.eos_token_id == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert set(ours.layer_windows) == {getattr(theirs, "sliding_window", None)}
    assert ours.attention_bias == (family == "Qwen2")
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_scaling": LLAMA3_ROPE, "rope_parameters": LINEAR_ROPE},
        {"rope_scaling": {key: LLAMA3_ROPE[key] for key in LLAMA3_ROPE if not key.startswith("original")}},
        {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 32},
        {"rope_parameters": {"rope_theta": 7e5}, "rope_theta": 5e5},
    ],
    ids=["old", "theta outside", "both", "no original", "original outside", "theta twice"],
)
def test_every_spelling_of_rope_gives_the_frequencies_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = {"model_type": "llama", **GEOMETRY, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.AutoConfig.from_pretrained(tmp_path)
    )
    ours = load_config(tmp_path)
    frequencies = inverse_frequencies(ours.head_dim, ours.rope_theta, ours.rope_scaling)
    np.testing.assert_allclose(frequencies, np.asarray(theirs.inv_freq), rtol=1e-6)
