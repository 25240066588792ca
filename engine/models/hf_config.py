"""Reads the geometry of a model from a Hugging Face ``config.json``.

A key that the file lacks has the value that transformers assumes for the architecture. Null means a size that follows
from others, or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.models.checked_values import LARGEST_COUNT, require_count, require_flag, require_token_ids, unsupported
from engine.models.families import Family, family_of
from engine.models.hf_rope import ropes_from_hf
from engine.models.layer_kinds import windows_from_hf

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NULLABLE = (
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "bos_token_id",
    "eos_token_id",
)
# What each family's files call the activation, and the names of it that mean the same.
_ACTIVATIONS = {"silu": ("hidden_act", ("silu", "swish")), "gelu_tanh": ("hidden_activation", ("gelu_pytorch_tanh",))}
_GEMMA3_WITH_VISION = "gemma3"
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "tie_word_embeddings")


def fields_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a ModelConfig.

    Args:
        config: the parsed JSON object.

    Raises:
        ConfigError: the architecture, activation, rope type or another feature is not supported, or a value has the
            wrong type.
    """
    config = _text_config(config)
    family = family_of(config.get("model_type"))
    _refuse_unsupported(config, family)
    values = {**family.defaults, **{key: config[key] for key in config if config[key] is not None or key in _NULLABLE}}
    if null := [key for key in SIZES if key in config and config[key] is None]:
        raise ConfigError(f"config.json has no value for {null}; restore the file as it was published")
    for key in SIZES:
        require_count(key, values[key], LARGEST_COUNT)
    windows = windows_from_hf(values, family)
    bias = values["attention_bias"] if family.attention_bias is None else family.attention_bias
    return {
        "model_type": config["model_type"],
        **{key: values[key] for key in (*SIZES, "rms_norm_eps", "max_position_embeddings")},
        "num_key_value_heads": _or_else(values.get("num_key_value_heads"), values["num_attention_heads"]),
        "head_dim": _or_else(values.get("head_dim"), _head_dim(values)),
        "tie_word_embeddings": values["tie_word_embeddings"],
        "layer_windows": windows,
        "attention_bias": bias,
        **{key: values[key] for key in family.settings},
        **ropes_from_hf(values, family, windows),
        "bos_token_id": _own_or_default(config, values, "bos_token_id"),
        "eos_token_id": require_token_ids("eos_token_id", _own_or_default(config, values, "eos_token_id")),
    }


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table of the language model, which a Gemma 3 that also sees images has within its own."""
    if config.get("model_type") != _GEMMA3_WITH_VISION:
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise unsupported("text_config of a gemma3", text, "a table, as published")
    whole = {key: config[key] for key in _OF_THE_WHOLE if key in config}
    return {**text, **whole, "model_type": "gemma3_text"}


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


def _refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    key, names = _ACTIVATIONS[family.activation]
    activation = _or_else(config.get(key), names[0])
    if activation not in names:
        raise unsupported(key, activation, [names[0]])
    for flag in ("mlp_bias", "use_bidirectional_attention"):
        if require_flag(flag, _or_else(config.get(flag), False)):
            raise unsupported(flag, True, [False])
    if "attn_logit_softcapping" not in family.settings and config.get("attn_logit_softcapping") is not None:
        raise unsupported("attn_logit_softcapping", config["attn_logit_softcapping"], "None, or model_type='gemma2'")
    packed = config.get("quantization_config")
    if packed is not None and (
        family.packed is None or not isinstance(packed, Mapping) or packed.get("quant_method") != family.packed
    ):
        also = f", or quant_method={family.packed!r}" if family.packed else ""
        raise unsupported("quantization_config", packed, f"unquantised weights{also}")
