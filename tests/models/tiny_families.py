"""A tiny model of each family whose layers are unlike, with every feature of the family in effect."""

from __future__ import annotations

from typing import Any

from engine.models.rotary import LinearScaling, YarnScaling

GEOMETRY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 192,
    "layer_windows": (7, None, 7),
}
# With a base of 100 one of the four pairs lies between those that are kept and those that are stretched.
YARN = YarnScaling(4.0, 64, 1.1386294361119891, beta_fast=8.0, beta_slow=1.0, truncate=False)
_GEMMA = {"query_pre_attn_scalar": 12, "tie_word_embeddings": True, "final_logit_softcapping": 4.0}
TINY: dict[str, dict[str, Any]] = {
    "mistral": {},
    "qwen3": {"rope_theta": 100.0, "rope_scaling": YARN},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 1.5},
    "gemma3_text": {
        **_GEMMA,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": LinearScaling(8.0),
    },
    "gpt_oss": {
        "attention_bias": True,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "swiglu_limit": 0.8,
        "rope_theta": 100.0,
        "rope_scaling": YARN,
    },
}


def tiny(model_type: str, **changes: Any) -> dict[str, Any]:
    """The fields of a ``ModelConfig``."""
    return GEOMETRY | {"model_type": model_type} | TINY[model_type] | changes
