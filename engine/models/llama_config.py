"""The geometry of a Llama-family model, and how a Hugging Face ``config.json`` states it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.errors import ConfigError
from engine.models.hf_rope import rope_from_hf, rope_to_hf
from engine.models.rotary import RopeScaling

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_REQUIRED_HF_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What transformers assumes where a config.json leaves these out: (rms_norm_eps, max_position_embeddings).
_HF_DEFAULTS = {"llama": (1e-6, 2048), "mistral": (1e-6, 131072), "qwen2": (1e-6, 32768)}
# As above, of sliding_window; null in the file means none.
_MISTRAL_WINDOW = 4096


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What fixes a model's shapes and arithmetic; fields are named as in Hugging Face configurations.

    Attributes:
        model_type: ``llama``, ``mistral`` or ``qwen2``.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_hidden_layers: layers.
        num_attention_heads: query heads, a multiple of ``num_key_value_heads``.
        num_key_value_heads: key and value heads.
        head_dim: size of a head, even.
        rms_norm_eps: what RMSNorm adds to the mean square.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: rule that stretches them, or None.
        max_position_embeddings: the model's context in tokens.
        tie_word_embeddings: whether the output projection is the embedding.
        sliding_window: tokens that a query sees, itself included, or None for all.
        attention_bias: whether q, k and v have biases (and the output projection too, where model_type is llama).
        bos_token_id: token that begins a text, or None.
        eos_token_id: tokens that end a text; may be empty.

    Raises:
        ConfigError: a value is out of range.
    """

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    attention_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.model_type not in _ARCHITECTURES:
            raise _unsupported("model_type", self.model_type, sorted(_ARCHITECTURES))
        for name in (*_REQUIRED_HF_KEYS, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            _require_positive_int(name, getattr(self, name))
        if self.sliding_window is not None:
            _require_positive_int("sliding_window", self.sliding_window)
            if self.model_type == "llama":
                raise _unsupported("sliding_window of a llama", self.sliding_window, "None, or model_type='mistral'")
        _require_positive("rms_norm_eps", self.rms_norm_eps)
        _require_positive("rope_theta", self.rope_theta)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"invalid model config: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; every KV head serves equally many query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"invalid model config: head_dim={self.head_dim} must be even: rotary turns pairs")

    @property
    def output_bias(self) -> bool:
        """Whether the attention output projection has a bias: llama's ``attention_bias`` means all four."""
        return self.attention_bias and self.model_type == "llama"

    @classmethod
    def from_mapping(cls, table: Mapping[str, Any]) -> LlamaConfig:
        """Read a table whose keys are exactly this class's fields, such as ``[model]`` of a file in ``configs/``.

        Args:
            table: field names to values; ``rope_scaling`` may be a table, ``eos_token_id`` a number or a list.

        Raises:
            ConfigError: a key is unknown, a required one is missing, or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(table) - known):
            raise ConfigError(f"unknown model config keys {unknown}; known are {sorted(known)}")
        required = {*_REQUIRED_HF_KEYS, "num_key_value_heads", "head_dim"}
        if missing := sorted(required - set(table)):
            raise ConfigError(f"model config lacks {missing}; add them")
        values = dict(table)
        if isinstance(values.get("rope_scaling"), Mapping):
            _, values["rope_scaling"] = rope_from_hf(values)
        values["eos_token_id"] = _token_ids("eos_token_id", values.get("eos_token_id"))
        return cls(**values)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read the contents of a Hugging Face ``config.json``.

        Keys without influence on the forward pass are passed over.

        Args:
            config: the parsed JSON object.

        Raises:
            ConfigError: the architecture, activation, rope type or another feature is not supported, a required key
                is missing, or a value is out of range.
        """
        model_type = config.get("model_type")
        if model_type not in _ARCHITECTURES:
            raise _unsupported("model_type", model_type, sorted(_ARCHITECTURES))
        if missing := [key for key in _REQUIRED_HF_KEYS if config.get(key) is None]:
            raise ConfigError(f"config.json lacks {missing}; restore the file as it was published")
        _refuse_unsupported(config)
        eps, context = _HF_DEFAULTS[model_type]
        heads = config["num_attention_heads"]
        _require_positive_int("num_attention_heads", heads)
        theta, scaling = rope_from_hf(config)
        return cls(
            model_type=model_type,
            **{key: config[key] for key in _REQUIRED_HF_KEYS},
            num_key_value_heads=_value_or(config, "num_key_value_heads", 8 if model_type == "mistral" else heads),
            head_dim=_value_or(config, "head_dim", config["hidden_size"] // heads),
            rms_norm_eps=_value_or(config, "rms_norm_eps", eps),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=_value_or(config, "max_position_embeddings", context),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            sliding_window=_sliding_window(config),
            attention_bias=model_type == "qwen2" or bool(config.get("attention_bias", False)),
            bos_token_id=config.get("bos_token_id"),
            eos_token_id=_token_ids("eos_token_id", config.get("eos_token_id")),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json`` of this model, readable by `from_hf` and by transformers."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rope_scaling"}
        eos = list(self.eos_token_id)
        return values | {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "hidden_act": "silu",
            "rope_scaling": rope_to_hf(self.rope_scaling),
            "use_sliding_window": self.sliding_window is not None,
            # Of a qwen2 model's layers the ones from max_window_layers on have the window.
            "max_window_layers": 0 if self.sliding_window is not None else self.num_hidden_layers,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        }


def _unsupported(name: str, value: object, supported: object) -> ConfigError:
    return ConfigError(f"unsupported model: {name}={value!r}; supported: {supported}")


def _require_positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"invalid model config: {name}={value!r} must be a positive integer")


def _require_positive(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"invalid model config: {name}={value!r} must be a positive number")


def _value_or(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ConfigError(f"invalid model config: {name}={value!r} must be token ids (one, a list, or none)")
    return ids


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise _unsupported("hidden_act", activation, ["silu"])
    if config.get("mlp_bias"):
        raise _unsupported("mlp_bias", True, [False])
    if config.get("quantization_config") is not None:
        raise _unsupported("quantization_config", config["quantization_config"], "unquantised weights only")


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    """Return the one window of all layers; llama has none, mistral's is on by its presence, qwen2's by a switch."""
    mistral = config["model_type"] == "mistral"
    window: int | None = config.get("sliding_window", _MISTRAL_WINDOW if mistral else None)
    if mistral:
        return window
    if config["model_type"] == "llama" or window is None or not config.get("use_sliding_window", False):
        return None
    layers = config["num_hidden_layers"]
    windowless = min(config.get("max_window_layers", 28), layers)
    kinds = config.get("layer_types") or ["full_attention"] * windowless + ["sliding_attention"] * (layers - windowless)
    if len(set(kinds)) > 1:
        raise _unsupported("layer_types", kinds, "the same sliding window in every layer, or in none")
    return window if kinds[0] == "sliding_attention" else None
