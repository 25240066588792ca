"""What configurations say of families whose layers are unlike: windows, bases, scales; and what is refused."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
from published_config import hf_config

from engine.errors import ConfigError
from engine.models.model_config import ModelConfig
from engine.models.rotary import LinearScaling, Rope, YarnScaling
from engine.models.sharding import abstract_model, weight_bytes

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "layer_types": KINDS}, (None, 64)),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": KINDS}, (None, 64)),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, (None, 64)),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 1}, (None, 64)),
        ({"model_type": "qwen3"}, (None, None)),
        ({"model_type": "gemma2"}, (64, None)),
        ({"model_type": "gemma2", "layer_types": KINDS}, (None, 64)),
        ({"model_type": "gpt_oss"}, (64, None)),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 2}, (64, None)),
        ({"model_type": "gemma3_text"}, (64, 64)),
    ],
)
def test_each_layer_has_the_window_that_its_family_or_its_file_says(
    changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    config = ModelConfig.from_hf(hf_config(sliding_window=64, **changes))
    assert config.layer_windows == windows
    assert [layer.window for layer in config.layer_attention] == list(windows)
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_gemma3_has_five_windows_to_one_full_layer_and_a_base_for_each() -> None:
    config = ModelConfig.from_hf(hf_config(model_type="gemma3_text", num_hidden_layers=13, sliding_window=64))
    assert config.layer_windows == ((64,) * 5 + (None,)) * 2 + (64,)
    for rope, window in zip(config.layer_ropes, config.layer_windows, strict=True):
        assert rope.theta == (500000.0 if window is None else 10000.0)


GEMMA3_ROPES = [
    {"rope_theta": 3e5, "rope_local_base_freq": 2e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    {
        "rope_theta": None,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
        },
    },
]


@pytest.mark.parametrize("spelling", GEMMA3_ROPES, ids=["flat", "nested"])
def test_of_two_bases_the_scaling_stretches_that_of_the_full_layers_alone(spelling: dict[str, Any]) -> None:
    kinds = {"model_type": "gemma3_text", "layer_types": KINDS}
    config = ModelConfig.from_hf(hf_config(**kinds, **spelling))
    assert config.layer_ropes == (Rope(3e5, LinearScaling(8.0)), Rope(2e3, None))
    assert config.context_length == config.max_position_embeddings  # which counts the scaling already
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_the_language_model_within_a_gemma3_is_read_with_the_end_tokens_of_the_whole() -> None:
    text = hf_config(model_type="gemma3_text", eos_token_id=7)
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 9}, "eos_token_id": [1, 6]}
    config = ModelConfig.from_hf(whole)
    assert config == dataclasses.replace(ModelConfig.from_hf(text), eos_token_id=(1, 6))
    for wrong in (None, [], "text"):
        with pytest.raises(ConfigError, match="text_config"):
            ModelConfig.from_hf(whole | {"text_config": wrong})


LINEAR_IN_BOTH = {kind: {"rope_type": "linear", "factor": 2.0} for kind in KINDS}
TWO_BASES = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in zip(KINDS, (1e6, 1e4), strict=True)}


def yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **changes}}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma"}, "gemma2.*gemma3_text.*gpt_oss.*llama.*mistral.*qwen2.*qwen3"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "hidden_activation"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"model_type": "gemma2", "attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
        ({"model_type": "gemma2", "final_logit_softcapping": "30"}, "final_logit_softcapping"),
        ({"model_type": "gemma2", "sliding_window": None}, "sliding_window"),
        ({"model_type": "gemma2", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"model_type": "gemma3_text", "rope_local_base_freq": "x"}, "rope_local_base_freq"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({"model_type": "gemma3_text", "rope_parameters": LINEAR_IN_BOTH}, "sliding_attention"),
        ({"model_type": "gpt_oss", "num_local_experts": 0}, "num_local_experts"),
        ({"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"model_type": "gpt_oss", "swiglu_limit": 0.0}, "swiglu_limit"),
        ({"model_type": "gpt_oss", "swiglu_alpha": "1"}, "swiglu_alpha"),
        ({"model_type": "mistral", "layer_types": KINDS, "rope_parameters": TWO_BASES}, "rope parameters"),
        *(
            (yarn(**{key: wrong}), key)
            for key in ("factor", "attention_factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
            for wrong in (-1.0, "x", [1], True)
        ),
        (yarn(factor=None), "factor"),
        (yarn(truncate="no"), "truncate"),
        (yarn(beta_fast=1, beta_slow=2), "beta_slow"),
        (yarn(mscale="x"), "mscale"),
        (yarn() | {"rope_theta": 1.0}, "rope_theta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_family_cannot_have_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_hf(hf_config(**changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [("query_pre_attn_scalar", 16), ("final_logit_softcapping", 3.0), ("num_local_experts", 4), ("swiglu_limit", 1.0)],
)
def test_a_field_of_other_families_is_refused_with_their_names(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{field} of a llama.*(gemma2|gpt_oss)"):
        dataclasses.replace(ModelConfig.from_hf(hf_config()), **{field: value})


@pytest.mark.parametrize("field", ["query_pre_attn_scalar", "rope_local_base_freq"])
def test_a_field_that_its_family_needs_must_be_there(field: str) -> None:
    with pytest.raises(ConfigError, match=f"a gemma3_text needs {field}"):
        dataclasses.replace(ModelConfig.from_hf(hf_config(model_type="gemma3_text")), **{field: None})


@pytest.mark.parametrize(
    "windows", [(4,), [4, 4], (4, 0), (4, True), (4, 2.0), (4, "4"), (4, [4]), (4, 4.0), (1, True)], ids=str
)
def test_windows_that_no_layers_have_are_refused(windows: Any) -> None:
    with pytest.raises(ConfigError, match="window"):
        dataclasses.replace(ModelConfig.from_hf(hf_config(model_type="mistral")), layer_windows=windows)


def test_layers_of_several_windows_are_a_model_but_not_a_config_json() -> None:
    config = dataclasses.replace(ModelConfig.from_hf(hf_config(model_type="mistral")), layer_windows=(4, 8))
    assert [layer.window for layer in config.layer_attention] == [4, 8]
    with pytest.raises(ConfigError, match="one window"):
        config.to_hf()


def test_yarn_lengthens_the_context_to_its_factor_of_the_one_before() -> None:
    rule = yarn(original_max_position_embeddings=4096)
    assert ModelConfig.from_hf(hf_config(**rule)).context_length == 16384
    assert ModelConfig.from_hf(hf_config(**rule, max_position_embeddings=131072)).context_length == 131072


def test_yarn_is_read_with_what_follows_from_its_factor_and_written_with_it() -> None:
    config = ModelConfig.from_hf(hf_config(**yarn(factor=32.0, truncate=False)))
    assert isinstance(config.rope_scaling, YarnScaling)
    assert config.rope_scaling.attention_factor == pytest.approx(1.3465735902799727)
    assert (config.rope_scaling.beta_fast, config.rope_scaling.beta_slow, config.rope_scaling.truncate) == (
        32,
        1,
        False,
    )
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_gpt_oss_has_its_own_yarn_where_a_file_says_nothing_of_rope() -> None:
    silent = {key: value for key, value in hf_config(model_type="gpt_oss").items() if "rope" not in key}
    config = ModelConfig.from_hf(silent)
    assert config.rope_theta == 150000.0
    assert isinstance(config.rope_scaling, YarnScaling)
    config = ModelConfig.from_hf(silent | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    assert (config.rope_theta, config.rope_scaling) == (1e4, None)


def test_soft_caps_that_a_file_says_are_none_are_none() -> None:
    none = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = ModelConfig.from_hf(hf_config(model_type="gemma2", **none))
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (None, None)
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_a_table_may_say_the_windows_as_a_file_does() -> None:
    table = dataclasses.asdict(ModelConfig.from_hf(hf_config(model_type="mistral")))
    windows = table.pop("layer_windows")
    assert windows == (4096, 4096)
    assert ModelConfig.from_mapping(table | {"sliding_window": 9}).layer_windows == (9, 9)
    mixed = {"sliding_window": 9, "layer_types": KINDS}
    assert ModelConfig.from_mapping(table | mixed).layer_windows == (None, 9)
    assert ModelConfig.from_mapping(table).layer_windows == (None, None)
    for wrong, named in (
        (mixed | {"layer_windows": windows}, "layer_windows beside"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"layer_types": KINDS}, "layer_types"),
        ({"sliding_window": 9, "layer_types": ["sliding_attention"]}, "layer_types"),
        ({"sliding_window": 9, "num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"sliding_window": 9, "model_type": ["mistral"]}, "model_type"),
        ({"sliding_window": 9, "model_type": "llama"}, "sliding_window of a llama"),
    ):
        with pytest.raises(ConfigError, match=named):
            ModelConfig.from_mapping(table | wrong)


def shipped(name: str) -> ModelConfig:
    return ModelConfig.from_mapping(tomllib.loads((CONFIGS / f"{name}.toml").read_text())["model"])


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3-8b", 8.03), ("mistral-7b", 7.24), ("qwen2.5-7b", 7.62), ("qwen3-8b", 8.19), ("gpt-oss-20b", 20.9)],
)
def test_the_shipped_geometries_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert weight_bytes(abstract_model(shipped(name), "bfloat16")) / 2e9 == pytest.approx(billions, rel=2e-3)


def test_the_shipped_layers_of_gemma3_and_gpt_oss_are_as_published() -> None:
    for name, expected in {"gemma-3-27b": {1024: 52, None: 10}, "gpt-oss-20b": {128: 12, None: 12}}.items():
        windows = shipped(name).layer_windows
        assert {window: windows.count(window) for window in set(windows)} == expected
