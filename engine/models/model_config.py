"""The geometry and arithmetic of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.errors import ConfigError
from engine.models.checked_values import (
    LARGEST_COUNT,
    LONGEST_CONTEXT,
    require_count,
    require_flag,
    require_number,
    require_token_ids,
    unsupported,
)
from engine.models.families import FAMILIES, Family, family_of
from engine.models.hf_config import SIZES, fields_from_hf
from engine.models.hf_rope import rope_from_hf, rope_to_hf
from engine.models.layer_kinds import kinds_of, layer_windows
from engine.models.rotary import LinearScaling, Rope, RopeScaling, YarnScaling

# More than any model has; Python loops over layers and heads, so their bounds are lower.
_LARGEST = {"num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12}
# Fields that only some families have, with the range of their values; see ``Family.settings``.
_RANGES = {
    "rope_local_base_freq": (1.0, 1e30),
    "query_pre_attn_scalar": (1e-6, 1e6),
    "attn_logit_softcapping": (1e-3, 1e6),
    "final_logit_softcapping": (1e-3, 1e6),
    "swiglu_alpha": (-1e6, 1e6),
    "swiglu_limit": (1e-3, 1e6),
}
_EXPERTS = ("num_local_experts", "num_experts_per_tok")
_ACTIVATIONS = {"silu": {"hidden_act": "silu"}, "gelu_tanh": {"hidden_activation": "gelu_pytorch_tanh"}}


@dataclass(frozen=True)
class AttentionKind:
    """What is fixed about one layer's attention; hashable.

    Attributes:
        sm_scale: factor on the logits.
        window: tokens that a query sees, its own included; None sees all before it.
        soft_cap: logits ``s`` become ``soft_cap * tanh(s / soft_cap)``; None leaves them.
    """

    sm_scale: float
    window: int | None = None
    soft_cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shapes and arithmetic of a model; fields are named as in Hugging Face configurations, but ``layer_windows``.

    What all models of one ``model_type`` have in common is in ``family``.

    Attributes:
        model_type: one of the keys of ``FAMILIES``.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP, or of each expert.
        num_hidden_layers: number of layers.
        num_attention_heads: query heads, a multiple of ``num_key_value_heads``.
        num_key_value_heads: key and value heads.
        head_dim: elements per head, even.
        rms_norm_eps: number that RMSNorm adds to the mean square.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: rule that stretches the wavelengths, or None.
        rope_local_base_freq: base of the wavelengths in layers with a window, which nothing stretches; None is as in
            the other layers.
        max_position_embeddings: the context in tokens, for most families before scaling lengthens it; see
            ``context_length``.
        tie_word_embeddings: whether the output projection is the embedding.
        layer_windows: of each layer, the tokens that a query sees, its own included, or None for all; empty is all
            tokens in every layer.
        attention_bias: whether q, k and v have biases (and, in all families but qwen2, the output projection).
        query_pre_attn_scalar: logits of attention are divided by its root; None is ``head_dim``.
        attn_logit_softcapping: bound that tanh keeps the logits of attention within, or None.
        final_logit_softcapping: bound that tanh keeps the logits of the next token within, or None.
        num_local_experts: experts of each layer, 0 in families without.
        num_experts_per_tok: experts that the router chooses for a token.
        swiglu_alpha: factor on the argument of the experts' sigmoid.
        swiglu_limit: bound that the experts' gate and its other half are clipped to.
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
    rope_local_base_freq: float | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    layer_windows: tuple[int | None, ...] = ()
    attention_bias: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        family_of(self.model_type)
        for name in (*SIZES, "num_key_value_heads", "head_dim"):
            require_count(name, getattr(self, name), _LARGEST.get(name, LARGEST_COUNT))
        for name in ("tie_word_embeddings", "attention_bias"):
            require_flag(name, getattr(self, name))
        require_number("rms_norm_eps", self.rms_norm_eps, least=1e-30, most=1.0)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"invalid model config: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; every KV head serves equally many query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"invalid model config: head_dim={self.head_dim} must be even: rotary turns pairs")
        self._check_rope()
        self._check_windows()
        self._check_settings()
        for name in ("bos_token_id", "eos_token_id"):
            ids = require_token_ids(name, getattr(self, name))
            if outside := [token for token in ids if token >= self.vocab_size]:
                raise ConfigError(
                    f"invalid model config: {name}={outside[0]} is outside the vocabulary of {self.vocab_size} tokens"
                )

    def _check_rope(self) -> None:
        require_count("max_position_embeddings", self.max_position_embeddings, LONGEST_CONTEXT)
        require_number("rope_theta", self.rope_theta, least=1.0, most=1e30)
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise unsupported("rope_scaling", self.rope_scaling, "LinearScaling, Llama3Scaling, YarnScaling or None")
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise ConfigError(f"invalid model config: rope_theta={self.rope_theta} must exceed 1 for rope_type 'yarn'")
        require_count("the context that rope_scaling lengthens", self.context_length, LONGEST_CONTEXT)

    def _check_windows(self) -> None:
        windows, layers = self.layer_windows or (None,) * self.num_hidden_layers, self.num_hidden_layers
        if not isinstance(windows, tuple) or len(windows) != layers:
            raise unsupported("layer_windows", windows, f"a tuple of {layers} windows, one of each layer")
        for window in set(windows) - {None}:
            require_count("sliding_window", window, LONGEST_CONTEXT)
            if not self.family.windowed:
                raise unsupported(f"sliding_window of a {self.model_type}", window, "None, or model_type='mistral'")
        object.__setattr__(self, "layer_windows", windows)

    def _check_settings(self) -> None:
        """Checks the fields that only some families have; those of other families must be as they are by default."""
        settings = self.family.settings
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in (*_RANGES, *_EXPERTS) or value == field.default:
                continue
            if field.name not in settings:
                having = sorted(name for name, family in FAMILIES.items() if field.name in family.settings)
                raise unsupported(f"{field.name} of a {self.model_type}", value, f"only of {having}")
            if field.name in _RANGES:
                least, most = _RANGES[field.name]
                require_number(field.name, value, least=least, most=most)
        if self.family.experts:
            experts = require_count("num_local_experts", self.num_local_experts, 1 << 16)
            require_count("num_experts_per_tok", self.num_experts_per_tok, experts)

    @property
    def family(self) -> Family:
        """What all models of this ``model_type`` have in common."""
        return family_of(self.model_type)

    @property
    def context_length(self) -> int:
        """Most tokens of a text: linear scaling by ``factor`` makes it ``factor`` times as long, where it does so."""
        most, scaling = self.max_position_embeddings, self.rope_scaling
        if isinstance(scaling, LinearScaling) and not self.family.context_is_scaled:
            return int(most * scaling.factor)
        if isinstance(scaling, YarnScaling):
            return max(most, int(scaling.original_max_position_embeddings * scaling.factor))
        return most

    @property
    def output_bias(self) -> bool:
        """Whether the attention output projection has a bias."""
        return self.attention_bias and self.family.output_bias

    @property
    def layer_attention(self) -> tuple[AttentionKind, ...]:
        """What is fixed about each layer's attention."""
        scale = float(self.query_pre_attn_scalar or self.head_dim) ** -0.5
        return tuple(AttentionKind(scale, window, self.attn_logit_softcapping) for window in self.layer_windows)

    @property
    def layer_ropes(self) -> tuple[Rope, ...]:
        """What each layer turns its queries and keys by."""
        whole, local = Rope(self.rope_theta, self.rope_scaling), self.rope_local_base_freq
        return tuple(whole if window is None or local is None else Rope(local, None) for window in self.layer_windows)

    @classmethod
    def from_mapping(cls, table: Mapping[str, Any]) -> ModelConfig:
        """Reads a table whose keys are fields of this class, such as ``[model]`` of a file in ``configs/``.

        Args:
            table: field names to values; ``rope_scaling`` may be a table, ``eos_token_id`` a number or a list.
                Instead of ``layer_windows`` it may have ``sliding_window``, and with it ``layer_types``, as a
                ``config.json`` has; without ``layer_types`` the family's own rule says which layers have the window.

        Raises:
            ConfigError: a key is unknown, a required one is missing, or a value is out of range.
        """
        known = {field.name for field in fields(cls)} | {"sliding_window", "layer_types"}
        if unknown := sorted(set(table) - known):
            raise ConfigError(f"unknown model config keys {unknown}; known are {sorted(known)}")
        required = {*SIZES, "num_key_value_heads", "head_dim"}
        if missing := sorted(required - set(table)):
            raise ConfigError(f"model config lacks {missing}; add them")
        values = {key: table[key] for key in table if key not in ("sliding_window", "layer_types")}
        if "sliding_window" in table or "layer_types" in table:
            if "layer_windows" in table:
                raise ConfigError("model config has layer_windows beside sliding_window or layer_types; give one")
            family = family_of(values.get("model_type", "llama"))
            require_count("num_hidden_layers", values["num_hidden_layers"], LARGEST_COUNT)
            values["layer_windows"] = layer_windows(table, family, table.get("sliding_window"))
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
        """The ``config.json`` of this model, readable by `from_hf` and by transformers.

        Raises:
            ConfigError: the layers have several windows, which such a file cannot say.
        """
        family, windows = self.family, sorted(set(self.layer_windows) - {None}, key=str)
        if len(windows) > 1:
            raise unsupported("layer_windows", windows, "one window in a config.json; layers with it, and without")
        window = windows[0] if windows else None
        left_out = {"rope_scaling", "layer_windows", *_RANGES, *_EXPERTS} - family.settings
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        eos = list(self.eos_token_id)
        values |= {
            "architectures": [family.architecture],
            **_ACTIVATIONS[family.activation],
            "rope_scaling": rope_to_hf(self.rope_scaling),
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        }
        if family.windowed:
            values |= {"sliding_window": window, "layer_types": kinds_of(self.layer_windows)}
        if "max_window_layers" in family.defaults:
            mixed = [layer for layer, each in enumerate(self.layer_windows) if each is not None]
            values |= {
                "use_sliding_window": window is not None,
                "max_window_layers": mixed[0] if mixed else self.num_hidden_layers,
            }
        return values
