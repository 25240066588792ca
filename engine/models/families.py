"""What is special about each family of models, as data, by ``model_type``.

The shared parts of a decoder are put together by it, and the reader of configurations has the defaults from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from engine.models.checked_values import unsupported


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of Hugging Face.

    Attributes:
        architecture: the class in transformers.
        defaults: what transformers assumes for a key that ``config.json`` leaves out.
        settings: fields of ``ModelConfig`` that only some families have, and this one has.
        activation: of the MLP's gate.
        attention_bias: whether q, k and v have biases; None where the configuration says.
        output_bias: whether the output projection has a bias where q, k and v have one.
        windowed: whether layers may have a sliding window.
        full_every: every so many layers one has full attention and the others the window; 0 is no such rule.
        qk_norm: whether each head of q and k is normalised before rotary.
        sandwich_norms: whether attention and MLP have a norm behind them, too.
        norm_from_one: whether a norm multiplies by one plus its weight.
        norm_scales_wide: whether a norm multiplies by its weight in float32, before it rounds to the model's dtype.
        scaled_embedding: whether embeddings are multiplied by the root of their width.
        sinks: whether attention has a sink logit per query head.
        experts: whether the MLP is a mixture of experts.
        context_is_scaled: whether ``max_position_embeddings`` already counts what linear scaling adds.
        packed: the ``quant_method`` of its published weights that is read; None takes unquantised weights only.
    """

    architecture: str
    defaults: Mapping[str, Any]
    settings: frozenset[str] = frozenset()
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_bias: bool | None = None
    output_bias: bool = True
    windowed: bool = True
    full_every: int = 0
    qk_norm: bool = False
    sandwich_norms: bool = False
    norm_from_one: bool = False
    norm_scales_wide: bool = False
    scaled_embedding: bool = False
    sinks: bool = False
    experts: bool = False
    context_is_scaled: bool = False
    packed: str | None = None


_LLAMA: Final = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL: Final = _LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN: Final = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GEMMA2: Final = _LLAMA | {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_GEMMA3: Final = _GEMMA2 | {
    "vocab_size": 262208,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_GPT_OSS: Final = _LLAMA | {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 131072,
    "attention_bias": True,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "bos_token_id": None,
    "eos_token_id": None,
}

FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family(architecture="LlamaForCausalLM", defaults=_LLAMA, windowed=False),
    "mistral": Family(architecture="MistralForCausalLM", defaults=_MISTRAL, attention_bias=False),
    "qwen2": Family(architecture="Qwen2ForCausalLM", defaults=_QWEN, attention_bias=True, output_bias=False),
    "qwen3": Family(architecture="Qwen3ForCausalLM", defaults=_QWEN | {"head_dim": 128}, qk_norm=True),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults=_GEMMA2,
        settings=frozenset({"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"}),
        activation="gelu_tanh",
        full_every=2,
        sandwich_norms=True,
        norm_from_one=True,
        norm_scales_wide=True,
        scaled_embedding=True,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults=_GEMMA3,
        settings=frozenset({"query_pre_attn_scalar", "final_logit_softcapping", "rope_local_base_freq"}),
        activation="gelu_tanh",
        full_every=6,
        qk_norm=True,
        sandwich_norms=True,
        norm_from_one=True,
        norm_scales_wide=True,
        scaled_embedding=True,
        context_is_scaled=True,
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        defaults=_GPT_OSS,
        settings=frozenset({"num_local_experts", "num_experts_per_tok", "swiglu_alpha", "swiglu_limit"}),
        full_every=2,
        norm_scales_wide=True,
        sinks=True,
        experts=True,
        packed="mxfp4",
    ),
}


def family_of(model_type: object) -> Family:
    """The family of a ``model_type``; raises ConfigError where it is not known."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unsupported("model_type", model_type, sorted(FAMILIES))
    return FAMILIES[model_type]
