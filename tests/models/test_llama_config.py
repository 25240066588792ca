from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.models.llama_config import LlamaConfig
from engine.models.rotary import LinearScaling, Llama3Scaling

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA3_RULE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf_config(**changes: Any) -> dict[str, Any]:
    base = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "use_cache": True,
    }
    return base | changes


def test_a_published_config_is_read_field_by_field() -> None:
    config = LlamaConfig.from_hf(hf_config())
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (256, 8, 2)
    assert config.head_dim == 32
    assert config.rope_theta == 500000.0
    assert config.rope_scaling is None
    assert (config.bos_token_id, config.eos_token_id) == (1, (2,))


@pytest.mark.parametrize(
    ("written", "read"), [(None, ()), (7, (7,)), ([7, 9], (7, 9)), (0, (0,))], ids=["none", "one", "list", "zero"]
)
def test_end_tokens_may_be_none_one_or_many(written: Any, read: tuple[int, ...]) -> None:
    assert LlamaConfig.from_hf(hf_config(eos_token_id=written)).eos_token_id == read


def test_missing_kv_heads_mean_multi_head_attention() -> None:
    config = hf_config()
    del config["num_key_value_heads"]
    assert LlamaConfig.from_hf(config).num_key_value_heads == 8


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "llama3", **LLAMA3_RULE}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "llama3", **LLAMA3_RULE}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, **LLAMA3_RULE}},
    ],
    ids=["rope_scaling", "old type", "rope_parameters"],
)
def test_every_spelling_of_rope_parameters_is_read_alike(spelling: dict[str, Any]) -> None:
    config = LlamaConfig.from_hf(hf_config(**spelling))
    assert config.rope_theta == 1e6
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


def test_linear_scaling_is_read() -> None:
    config = LlamaConfig.from_hf(hf_config(rope_scaling={"type": "linear", "factor": 2}))
    assert config.rope_scaling == LinearScaling(2.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3_RULE, "low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 33}, "head_dim=33"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"vocab_size": "many"}, "vocab_size='many'"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        LlamaConfig.from_hf(hf_config(**changes))


def test_qwen2_has_biases_on_q_k_v_alone_and_llama_on_all_four() -> None:
    qwen2 = LlamaConfig.from_hf(hf_config(model_type="qwen2"))
    llama = LlamaConfig.from_hf(hf_config(attention_bias=True))
    assert (qwen2.attention_bias, qwen2.output_bias) == (True, False)
    assert (llama.attention_bias, llama.output_bias) == (True, True)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 128}, 128),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "qwen2", "sliding_window": 128}, None),
        ({"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": True, "max_window_layers": 0}, 128),
        ({"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"sliding_window": 128}, None),
    ],
)
def test_the_sliding_window_is_the_one_that_the_architecture_applies(
    changes: dict[str, Any], window: int | None
) -> None:
    assert LlamaConfig.from_hf(hf_config(**changes)).sliding_window == window


def test_a_window_in_some_layers_only_is_refused() -> None:
    mixed = hf_config(model_type="qwen2", sliding_window=128, use_sliding_window=True, max_window_layers=1)
    with pytest.raises(ConfigError, match="layer_types"):
        LlamaConfig.from_hf(mixed)


@pytest.mark.parametrize(
    "config",
    [
        hf_config(rope_scaling={"rope_type": "llama3", **LLAMA3_RULE}, eos_token_id=[2, 3]),
        hf_config(rope_scaling={"rope_type": "linear", "factor": 2.0}, tie_word_embeddings=True),
        hf_config(model_type="mistral", sliding_window=64),
        hf_config(model_type="qwen2", eos_token_id=None),
        hf_config(model_type="qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=0),
    ],
)
def test_a_written_config_reads_back_equal(config: dict[str, Any]) -> None:
    read = LlamaConfig.from_hf(config)
    assert LlamaConfig.from_hf(read.to_hf()) == read


def test_a_table_must_name_known_fields_and_all_required_ones() -> None:
    table = dataclasses.asdict(LlamaConfig.from_hf(hf_config()))
    assert LlamaConfig.from_mapping(table) == LlamaConfig.from_hf(hf_config())
    with pytest.raises(ConfigError, match="hiden_size"):
        LlamaConfig.from_mapping(table | {"hiden_size": 1})
    del table["head_dim"]
    with pytest.raises(ConfigError, match="head_dim"):
        LlamaConfig.from_mapping(table)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_geometry_is_valid(path: Path) -> None:
    content = tomllib.loads(path.read_text())
    assert "engine" in content
    if "model" in content:
        config = LlamaConfig.from_mapping(content["model"])
        assert content["engine"]["context_length"] <= config.max_position_embeddings


def test_the_published_models_cost_the_published_bytes_per_token() -> None:
    # 2 (K and V) · layers · KV heads · head_dim · 2 bytes, from the models' papers.
    kib = {"llama-3-8b": 128, "llama-3-70b": 320, "qwen2.5-7b": 56, "mistral-7b": 128}
    for name, expected in kib.items():
        model = LlamaConfig.from_mapping(tomllib.loads((CONFIGS / f"{name}.toml").read_text())["model"])
        assert 4 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim == expected * 1024
