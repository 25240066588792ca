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
    randomise,
    save,
    torch,
    transformers,
)
from numpy.typing import NDArray
from random_model import jitted_logits, random_model
from safetensors.numpy import load_file, save_file

from engine.models.checkpoint import load_config, load_model, save_model
from engine.models.families import FAMILIES
from engine.models.hf_rope import rope_to_hf
from engine.models.model_config import ModelConfig
from engine.models.mxfp4 import decoded
from engine.models.rotary import LinearScaling, YarnScaling, inverse_frequencies

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


def test_the_language_model_of_a_gemma3_that_sees_images_is_read(tmp_path: Path) -> None:
    _, settings = UNLIKE["gemma3"]
    text = {**GEOMETRY, **settings}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        eos_token_id=[1, 6],
        **{f"{name}_token_index": 200 for name in ("boi", "eoi", "image")},
        attn_implementation="eager",
    )
    model = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng().integers(0, 199, PROMPT_TOKENS)
    ours = load_model(tmp_path, dtype="float32")
    assert (ours.config.model_type, ours.config.eos_token_id) == ("gemma3_text", (1, 6))
    logits = np.asarray(jitted_logits(ours, tokens.astype(np.int32)))
    np.testing.assert_allclose(logits, hf_logits(model, tokens), atol=1e-4, rtol=0)
    stored = load_file(tmp_path / "model.safetensors")
    others = {name.replace("language_model.model.", "model.language_model."): stored[name] for name in stored}
    assert others.keys() != stored.keys()
    save_file(others, tmp_path / "model.safetensors")
    again = jitted_logits(load_model(tmp_path, dtype="float32"), tokens.astype(np.int32))
    np.testing.assert_array_equal(again, logits)


WRITTEN = {
    "llama": {},
    "qwen2": {"attention_bias": True, "layer_windows": (None, 7)},
    "mistral": {"layer_windows": (7, 7)},
    "qwen3": {"layer_windows": (7, None), "rope_scaling": YarnScaling(8.0, 64, 1.1)},
    "gemma2": {
        "layer_windows": (7, None),
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "layer_windows": (7, None),
        "query_pre_attn_scalar": 20,
        "rope_local_base_freq": 500.0,
        "rope_scaling": LinearScaling(8.0),
    },
    "gpt_oss": {
        "layer_windows": (7, None),
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "swiglu_limit": 1.5,
        "attention_bias": True,
        "rope_scaling": YarnScaling(8.0, 64, 1.3, truncate=False),
    },
}


@pytest.mark.parametrize("model_type", WRITTEN)
def test_transformers_reads_what_is_saved_here(tmp_path: Path, model_type: str) -> None:
    config = ModelConfig(**GEOMETRY | {"head_dim": 16, "model_type": model_type} | WRITTEN[model_type])
    model = random_model(config)
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = random_prompt()
    ours = np.asarray(jitted_logits(model, tokens.astype(np.int32)))
    np.testing.assert_allclose(ours, hf_logits(theirs, tokens), atol=1e-4 * np.abs(ours).max(), rtol=0)


def test_every_family_is_written() -> None:
    assert WRITTEN.keys() == FAMILIES.keys()


ROPE = {"rope_local_base_freq"}  # which transformers keeps in the table of rope
CONFIGS = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Gemma2": "gemma2",
    "Gemma3Text": "gemma3_text",
    "GptOss": "gpt_oss",
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    "left_out", [(), *((key,) for key in GEOMETRY), tuple(GEOMETRY)], ids=["none", *GEOMETRY, "all"]
)
def test_what_a_config_leaves_out_is_what_transformers_assumes(family: str, left_out: tuple[str, ...]) -> None:
    given = {key: value for key, value in GEOMETRY.items() if key not in left_out}
    if "num_attention_heads" in left_out or "hidden_size" in left_out:
        given["head_dim"] = 16
    try:
        theirs = getattr(transformers, f"{family}Config")(**given)
    except Exception:
        pytest.skip("no model: the width is not a multiple of the heads")
    if theirs.num_attention_heads % theirs.num_key_value_heads:
        pytest.skip("no model")
    ours = ModelConfig.from_hf({"model_type": CONFIGS[family]} | given)
    for name in (*GEOMETRY, "rms_norm_eps", "tie_word_embeddings", "bos_token_id", *ours.family.settings - ROPE):
        assert getattr(ours, name) == getattr(theirs, name, "its own"), name
    assert ours.eos_token_id == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    kinds = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    assert ours.layer_windows == tuple(
        None if kinds and kinds[layer] == "full_attention" else window for layer in range(theirs.num_hidden_layers)
    )
    assert ours.attention_bias == (family == "Qwen2" or getattr(theirs, "attention_bias", False))
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)


@pytest.mark.parametrize("family", CONFIGS)
def test_rope_that_a_config_leaves_out_is_what_transformers_assumes(family: str) -> None:
    theirs = getattr(transformers, f"{family}Config")(**GEOMETRY).rope_parameters
    ours = ModelConfig.from_hf({"model_type": CONFIGS[family]} | GEOMETRY)
    whole = theirs.get("full_attention", theirs)
    assert ours.rope_theta == whole["rope_theta"]
    assert ours.rope_local_base_freq == theirs.get("sliding_attention", {}).get("rope_theta")
    assert (rope_to_hf(ours.rope_scaling) or {"rope_type": "default"}).items() >= {
        key: value for key, value in whole.items() if key != "rope_theta"
    }.items()


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_scaling": LLAMA3_ROPE, "rope_parameters": LINEAR_ROPE},
        {"rope_scaling": {key: LLAMA3_ROPE[key] for key in LLAMA3_ROPE if not key.startswith("original")}},
        {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 32},
        {"rope_parameters": {"rope_theta": 7e5}, "rope_theta": 5e5},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {**YARN_ROPE, "beta_fast": 8, "beta_slow": 2}},
        {"rope_scaling": {**YARN_ROPE, "truncate": False}},
        {"rope_scaling": {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.5}},
        {"rope_scaling": {**YARN_ROPE, "original_max_position_embeddings": 4}},
    ],
    ids=[
        *("old", "theta outside", "both", "no original", "original outside", "theta twice"),
        *("yarn", "yarn by betas", "yarn untruncated", "yarn by mscale", "yarn from a short context"),
    ],
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
    factor = getattr(ours.rope_scaling, "attention_factor", 1.0)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 3e5, "rope_local_base_freq": 2e3},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 7e5},
        {"rope_parameters": {"full_attention": YARN_ROPE, "sliding_attention": {"rope_type": "default"}}},
    ],
    ids=["none", "bases", "scaled", "both", "nested"],
)
def test_both_bases_of_gemma3_turn_as_in_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = {"model_type": "gemma3_text", **GEOMETRY, "num_hidden_layers": 6, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding(
        transformers.AutoConfig.from_pretrained(tmp_path)
    )
    ours = load_config(tmp_path)
    for layer, kind in ((0, "sliding_attention"), (5, "full_attention")):
        theta, scaling = ours.layer_ropes[layer]
        frequencies = inverse_frequencies(ours.head_dim, theta, scaling)
        np.testing.assert_allclose(frequencies, np.asarray(getattr(theirs, f"{kind}_inv_freq")), rtol=1e-6)


def test_mxfp4_is_decoded_as_transformers_decodes_it() -> None:
    rng = np.random.default_rng()
    blocks = rng.integers(0, 256, (3, 8, 2, 16), np.uint8)
    scales = rng.integers(110, 140, (3, 8, 2), np.uint8)
    decode = transformers.integrations.mxfp4.convert_moe_packed_tensors
    theirs = decode(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    np.testing.assert_array_equal(decoded(blocks, scales).swapaxes(1, 2), np.asarray(theirs))
