"""The geometry of a Llama-family model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.errors import ConfigError
from engine.models.checked_values import require_count, require_flag, require_number, require_token_ids, unsupported
from engine.models.hf_config import ARCHITECTURES, LARGEST_COUNT, SIZES, fields_from_hf
from engine.models.hf_rope import rope_from_hf, rope_to_hf
from engine.models.rotary import LinearScaling, RopeScaling

# More than any model has; Python loops over layers and heads, so their bounds are lower.
_LARGEST = {"num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12}
_LONGEST_CONTEXT = (1 << 31) - 1  # positions are int32


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shapes and arithmetic of a model; fields are named as in Hugging Face configurations.

    Attributes:
        model_type: ``llama``, ``mistral`` or ``qwen2``.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_hidden_layers: number of layers.
        num_attention_heads: query heads, a multiple of ``num_key_value_heads``.
        num_key_value_heads: key and value heads.
        head_dim: elements per head, even.
        rms_norm_eps: number that RMSNorm adds to the mean square.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: rule that stretches the wavelengths, or None.
        max_position_embeddings: the context in tokens before linear scaling lengthens it; see ``context_length``.
        tie_word_embeddings: whether the output projection is the embedding.
        sliding_window: tokens that a query sees, its own included, or None for all.
        attention_bias: whether q, k and v have biases (and, where model_type is llama, the output projection).
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
        if not isinstance(self.model_type, str) or self.model_type not in ARCHITECTURES:
            raise unsupported("model_type", self.model_type, sorted(ARCHITECTURES))
        for name in (*SIZES, "num_key_value_heads", "head_dim"):
            require_count(name, getattr(self, name), _LARGEST.get(name, LARGEST_COUNT))
        require_count("max_position_embeddings", self.max_position_embeddings, _LONGEST_CONTEXT)
        require_count("the context that rope_scaling lengthens", self.context_length, _LONGEST_CONTEXT)
        for name in ("tie_word_embeddings", "attention_bias"):
            require_flag(name, getattr(self, name))
        if self.sliding_window is not None:
            require_count("sliding_window", self.sliding_window, _LONGEST_CONTEXT)
            if self.model_type == "llama":
                raise unsupported("sliding_window of a llama", self.sliding_window, "None, or model_type='mistral'")
        require_number("rms_norm_eps", self.rms_norm_eps, least=1e-30, most=1.0)
        require_number("rope_theta", self.rope_theta, least=1.0, most=1e30)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"invalid model config: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; every KV head serves equally many query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"invalid model config: head_dim={self.head_dim} must be even: rotary turns pairs")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise unsupported("rope_scaling", self.rope_scaling, "LinearScaling, Llama3Scaling or None")
        for name in ("bos_token_id", "eos_token_id"):
            ids = require_token_ids(name, getattr(self, name))
            if outside := [token for token in ids if token >= self.vocab_size]:
                raise ConfigError(
                    f"invalid model config: {name}={outside[0]} is outside the vocabulary of {self.vocab_size} tokens"
                )

    @property
    def context_length(self) -> int:
        """Most tokens of a text: linear scaling by ``factor`` makes it ``factor`` times as long."""
        if isinstance(self.rope_scaling, LinearScaling):
            return int(self.max_position_embeddings * self.rope_scaling.factor)
        return self.max_position_embeddings

    @property
    def output_bias(self) -> bool:
        """Whether the attention output projection has a bias: llama's ``attention_bias`` adds one to all four."""
        return self.attention_bias and self.model_type == "llama"

    @classmethod
    def from_mapping(cls, table: Mapping[str, Any]) -> ModelConfig:
        """Reads a table whose keys are fields of this class, such as ``[model]`` of a file in ``configs/``.

        Args:
            table: field names to values; ``rope_scaling`` may be a table, ``eos_token_id`` a number or a list.

        Raises:
            ConfigError: a key is unknown, a required one is missing, or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(table) - known):
            raise ConfigError(f"unknown model config keys {unknown}; known are {sorted(known)}")
        required = {*SIZES, "num_key_value_heads", "head_dim"}
        if missing := sorted(required - set(table)):
            raise ConfigError(f"model config lacks {missing}; add them")
        values = dict(table)
        if isinstance(values.get("rope_scaling"), Mapping):
            _, values["rope_scaling"] = rope_from_hf(values)
        values["eos_token_id"] = require_token_ids("eos_token_id", values.get("eos_token_id"))
        return cls(**values)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads the contents of a Hugging Face ``config.json``.

        Keys without influence on the forward pass are ignored; keys left out have the architecture's defaults.

        Args:
            config: the parsed JSON object.

        Raises:
            ConfigError: the architecture, activation, rope type or another feature is not supported, or a value has
                the wrong type or is out of range.
        """
        return cls(**fields_from_hf(config))

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model, readable by `from_hf` and by transformers."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rope_scaling"}
        eos = list(self.eos_token_id)
        return values | {
            "architectures": [ARCHITECTURES[self.model_type]],
            "hidden_act": "silu",
            "rope_scaling": rope_to_hf(self.rope_scaling),
            "use_sliding_window": self.sliding_window is not None,
            # The layers of a qwen2 model from max_window_layers on have the window.
            "max_window_layers": 0 if self.sliding_window is not None else self.num_hidden_layers,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        }
