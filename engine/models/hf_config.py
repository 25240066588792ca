"""Reads the geometry of a Llama-family model from a Hugging Face ``config.json``.

A key that the file lacks has the value that transformers assumes for the architecture. Null means a size that follows
from others, or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.models.checked_values import require_count, require_flag, require_token_ids, unsupported
from engine.models.hf_rope import rope_from_hf

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LARGEST_COUNT = 1 << 24  # above it, the product of two sizes fits no memory

_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _LLAMA
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}
_NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window", "bos_token_id", "eos_token_id")
_FULL, _SLIDING = "full_attention", "sliding_attention"


def fields_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a ModelConfig.

    Args:
        config: the parsed JSON object.

    Raises:
        ConfigError: the architecture, activation, rope type or another feature is not supported, or a value has the
            wrong type.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise unsupported("model_type", model_type, sorted(ARCHITECTURES))
    _refuse_unsupported(config)
    defaults = _DEFAULTS[model_type]
    values = defaults | {key: config[key] for key in config if config[key] is not None or key in _NULLABLE}
    if null := [key for key in SIZES if key in config and config[key] is None]:
        raise ConfigError(f"config.json has no value for {null}; restore the file as it was published")
    for key in SIZES:
        require_count(key, values[key], LARGEST_COUNT)
    window = _sliding_window(values)
    theta, scaling = rope_from_hf(values, _FULL if window is None else _SLIDING)
    return {
        "model_type": model_type,
        **{key: values[key] for key in (*SIZES, "rms_norm_eps", "max_position_embeddings")},
        "num_key_value_heads": _or_else(values.get("num_key_value_heads"), values["num_attention_heads"]),
        "head_dim": _or_else(values.get("head_dim"), _head_dim(values)),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": values["tie_word_embeddings"],
        "sliding_window": window,
        "attention_bias": model_type == "qwen2" or (model_type == "llama" and values.get("attention_bias", False)),
        "bos_token_id": _own_or_default(config, values, "bos_token_id"),
        "eos_token_id": require_token_ids("eos_token_id", _own_or_default(config, values, "eos_token_id")),
    }


def _or_else(value: Any, default: Any) -> Any:
    return default if value is None else value


def _own_or_default(config: Mapping[str, Any], values: Mapping[str, Any], key: str) -> Any:
    """A token id; the architecture's default counts only where the vocabulary has it."""
    token = values[key]
    return token if key in config or token is None or token < values["vocab_size"] else None


def _head_dim(values: Mapping[str, Any]) -> int | None:
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if values.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"invalid model config: hidden_size={hidden} is not a multiple of num_attention_heads={heads}, and no "
            "head_dim is given; one of the three is wrong"
        )
    return int(hidden // heads)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    activation = _or_else(config.get("hidden_act"), "silu")
    if activation not in ("silu", "swish"):
        raise unsupported("hidden_act", activation, ["silu"])
    if require_flag("mlp_bias", _or_else(config.get("mlp_bias"), False)):
        raise unsupported("mlp_bias", True, [False])
    if config.get("quantization_config") is not None:
        raise unsupported("quantization_config", config["quantization_config"], "unquantised weights only")


def _sliding_window(values: Mapping[str, Any]) -> int | None:
    """The window of all layers: llama has none, mistral has the one given, qwen2 if ``use_sliding_window`` is set."""
    model_type, layers = values["model_type"], values["num_hidden_layers"]
    on = model_type == "mistral" or (
        model_type == "qwen2" and require_flag("use_sliding_window", values.get("use_sliding_window", False))
    )
    window: int | None = values.get("sliding_window") if on else None
    kind = _layer_kind(values, layers, windowed=window is not None)
    if kind == _SLIDING and window is None:
        raise unsupported("layer_types", kind, f"{_FULL} where a {model_type} has no sliding_window")
    return window if kind == _SLIDING else None


def _layer_kind(values: Mapping[str, Any], layers: int, *, windowed: bool) -> str:
    """The kind of every layer; raises ConfigError where the layers differ."""
    kinds = values.get("layer_types")
    if kinds is None:
        windowless = 0 if windowed else layers
        if windowed and values["model_type"] == "qwen2":
            first = values["max_window_layers"]
            windowless = 0 if first == 0 else min(require_count("max_window_layers", first, LARGEST_COUNT), layers)
        kinds = [_FULL] * windowless + [_SLIDING] * (layers - windowless)
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds) or len(kinds) != layers:
        raise unsupported("layer_types", kinds, f"a list of {layers} names, one for each of num_hidden_layers")
    counts = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    if unknown := counts.keys() - {_FULL, _SLIDING}:
        raise unsupported("layer_types", sorted(unknown), [_FULL, _SLIDING])
    if len(counts) > 1:
        raise unsupported("layer_types", counts, "the same sliding window in every layer, or in none")
    return str(kinds[0])
