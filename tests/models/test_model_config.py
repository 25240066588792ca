from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.models.model_config import ModelConfig
from engine.models.rotary import LinearScaling, Llama3Scaling

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA3_RULE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
ABSURD = (0, -1.0, float("inf"), float("nan"), 1e300, 10**400, "10000", True, [1.0], {})


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
    config = ModelConfig.from_hf(hf_config())
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (256, 8, 2)
    assert config.head_dim == 32
    assert config.rope_theta == 500000.0
    assert config.rope_scaling is None
    assert (config.bos_token_id, config.eos_token_id) == (1, (2,))


@pytest.mark.parametrize(
    ("written", "read"), [(None, ()), (7, (7,)), ([7, 9], (7, 9)), (0, (0,))], ids=["none", "one", "list", "zero"]
)
def test_end_tokens_may_be_none_one_or_many(written: Any, read: tuple[int, ...]) -> None:
    assert ModelConfig.from_hf(hf_config(eos_token_id=written)).eos_token_id == read


def test_missing_kv_heads_mean_multi_head_attention() -> None:
    config = hf_config()
    del config["num_key_value_heads"]
    assert ModelConfig.from_hf(config).num_key_value_heads == 8


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
    config = ModelConfig.from_hf(hf_config(**spelling))
    assert config.rope_theta == 1e6
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(("kind", "theta"), [("full_attention", 1e6), ("sliding_attention", 1e4)])
def test_of_nested_rope_parameters_those_of_the_layers_are_read(kind: str, theta: float) -> None:
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    }
    config = ModelConfig.from_hf(hf_config(model_type="mistral", layer_types=[kind] * 2, rope_parameters=nested))
    assert (config.rope_theta, config.rope_scaling) == (theta, None if theta == 1e6 else LinearScaling(4.0))
    del nested[kind]
    with pytest.raises(ConfigError, match=kind):
        ModelConfig.from_hf(hf_config(model_type="mistral", layer_types=[kind] * 2, rope_parameters=nested))


def test_linear_scaling_lengthens_the_context_and_no_other_does() -> None:
    def context(**changes: Any) -> int:
        config = ModelConfig.from_hf(hf_config(**changes))
        assert ModelConfig.from_hf(config.to_hf()) == config
        return config.context_length

    assert context() == 4096
    assert context(rope_scaling={"type": "linear", "factor": 4.0}) == 16384
    assert context(rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}) == 10240
    assert context(rope_scaling={"rope_type": "llama3", **LLAMA3_RULE}) == 4096


def test_the_context_before_llama3_scaling_is_the_models_where_it_is_left_out() -> None:
    rule = {key: value for key, value in LLAMA3_RULE.items() if key != "original_max_position_embeddings"}
    config = ModelConfig.from_hf(hf_config(rope_scaling={"rope_type": "llama3", **rule}))
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 4096)


@pytest.mark.parametrize(
    ("model_type", "eos", "bos", "eps", "context", "kv_heads", "window"),
    [
        ("llama", (2,), 1, 1e-6, 2048, 16, None),
        ("mistral", (2,), 1, 1e-6, 131072, 8, 4096),
        ("qwen2", (), None, 1e-6, 32768, 32, None),
    ],
)
def test_what_a_config_leaves_out_is_the_architectures_own(
    model_type: str, eos: Any, bos: Any, eps: float, context: int, kv_heads: int, window: int | None
) -> None:
    heads = 32 if model_type == "qwen2" else 16
    given = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2}
    config = ModelConfig.from_hf({"model_type": model_type, **given, "num_attention_heads": heads})
    assert (config.eos_token_id, config.bos_token_id) == (eos, bos)
    assert (config.rms_norm_eps, config.max_position_embeddings, config.rope_theta) == (eps, context, 1e4)
    assert (config.num_key_value_heads, config.head_dim) == (kv_heads, 256 // heads)
    assert config.layer_windows == (window, window)
    assert not config.tie_word_embeddings


def test_an_end_token_of_the_architecture_that_the_vocabulary_lacks_is_none() -> None:
    config = {key: value for key, value in hf_config(vocab_size=2).items() if "token_id" not in key}
    assert ModelConfig.from_hf(config).eos_token_id == ()


def test_linear_scaling_is_read() -> None:
    config = ModelConfig.from_hf(hf_config(rope_scaling={"type": "linear", "factor": 2}))
    assert config.rope_scaling == LinearScaling(2.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
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
        *(({key: wrong}, key) for key in COUNTS for wrong in (2.0, "2", True, [2], -1, 2**40, 10**400)),
        *(({"rope_theta": wrong}, "rope_theta") for wrong in ABSURD),
        *(({"rms_norm_eps": wrong}, "rms_norm_eps") for wrong in ABSURD),
        *(({"rope_scaling": {"type": "linear", "factor": wrong}}, "factor") for wrong in (*ABSURD, None, 0.5)),
        *(
            ({"rope_scaling": {"type": "llama3", **LLAMA3_RULE, key: wrong}}, key)
            for key in LLAMA3_RULE
            for wrong in ABSURD
        ),
        *(({key: "false"}, key) for key in ("tie_word_embeddings", "attention_bias", "mlp_bias")),
        *(({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, kind) for kind in ("dynamic", "longrope", "su")),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type"),
        *(
            ({key: wrong}, "rope parameters")
            for key in ("rope_scaling", "rope_parameters")
            for wrong in ([1], False, "", 0)
        ),
        ({"rope_scaling": {"rope_type": ""}}, "rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 1e6}}, "context"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"hidden_size": 250}, "hidden_size=250 is not a multiple"),
        ({"eos_token_id": 512}, "eos_token_id=512"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"bos_token_id": "<s>"}, "bos_token_id"),
        ({"bos_token_id": 512}, "bos_token_id=512"),
        ({"model_type": "mistral", "sliding_window": "64"}, "sliding_window"),
        ({"model_type": "qwen2", "use_sliding_window": 1}, "use_sliding_window"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "0"}, "max_window_layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_hf(hf_config(**changes))


def test_qwen2_has_biases_on_q_k_v_alone_and_llama_on_all_four() -> None:
    qwen2 = ModelConfig.from_hf(hf_config(model_type="qwen2"))
    llama = ModelConfig.from_hf(hf_config(attention_bias=True))
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
    assert ModelConfig.from_hf(hf_config(**changes)).layer_windows == (window, window)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"layer_types": ["sliding_attention"] * 2}, 4096),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 64}, 64),
        ({"layer_types": ["full_attention"] * 2}, None),
        ({"layer_types": ["full_attention"] * 2, "sliding_window": 64}, None),
        ({"layer_types": None, "sliding_window": 64}, 64),
    ],
)
def test_layer_types_of_a_mistral_say_whether_it_has_its_window(changes: dict[str, Any], window: int | None) -> None:
    assert ModelConfig.from_hf(hf_config(model_type="mistral") | changes).layer_windows == (window, window)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize(
    "kinds",
    [
        ["full_attention"],
        ["full_attention", "chunked_attention"],
        ["full_attention", 1],
        "full_attention",
        [],
    ],
    ids=str,
)
def test_layer_types_that_are_not_known_or_not_one_a_layer_are_refused(model_type: str, kinds: Any) -> None:
    config = hf_config(model_type=model_type, layer_types=kinds, sliding_window=64, use_sliding_window=True)
    with pytest.raises(ConfigError, match="layer_types"):
        ModelConfig.from_hf(config)


def test_a_window_that_layer_types_ask_for_must_be_there() -> None:
    for model_type, window in (("llama", 64), ("mistral", None), ("qwen2", 64)):
        kinds = ["sliding_attention"] * 2
        with pytest.raises(ConfigError, match="layer_types"):
            ModelConfig.from_hf(hf_config(model_type=model_type, layer_types=kinds, sliding_window=window))


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
    read = ModelConfig.from_hf(config)
    assert ModelConfig.from_hf(read.to_hf()) == read


def test_a_table_must_name_known_fields_and_all_required_ones() -> None:
    table = dataclasses.asdict(ModelConfig.from_hf(hf_config()))
    assert ModelConfig.from_mapping(table) == ModelConfig.from_hf(hf_config())
    with pytest.raises(ConfigError, match="hiden_size"):
        ModelConfig.from_mapping(table | {"hiden_size": 1})
    del table["head_dim"]
    with pytest.raises(ConfigError, match="head_dim"):
        ModelConfig.from_mapping(table)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_geometry_is_valid(path: Path) -> None:
    content = tomllib.loads(path.read_text())
    assert "engine" in content
    if "model" in content:
        config = ModelConfig.from_mapping(content["model"])
        assert content["engine"]["context_length"] <= config.max_position_embeddings


def test_the_published_models_cost_the_published_bytes_per_token() -> None:
    # 2 (K and V) · layers · KV heads · head_dim · 2 bytes, from the models' papers.
    kib = {"llama-3-8b": 128, "llama-3-70b": 320, "qwen2.5-7b": 56, "mistral-7b": 128}
    for name, expected in kib.items():
        model = ModelConfig.from_mapping(tomllib.loads((CONFIGS / f"{name}.toml").read_text())["model"])
        assert 4 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim == expected * 1024
