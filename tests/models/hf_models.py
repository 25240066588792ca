"""Random models of transformers, and what they answer: an implementation by others, for the tests that judge by it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

with warnings.catch_warnings():
    # Both warn of their own dependencies while they are imported.
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason="torch is not installed (the extra 'hf')")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra 'hf')")

GEOMETRY = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
WINDOW = 7
_FULL, _SLIDING = "full_attention", "sliding_attention"
_QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW, "num_hidden_layers": 4}
_GEMMA = {"head_dim": 24, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}
_GEMMA3_ROPES = {
    _FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    _SLIDING: {"rope_type": "default", "rope_theta": 5000.0},
}
_GPT_OSS = {
    "head_dim": 16,
    "sliding_window": WINDOW,
    "num_hidden_layers": 4,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "swiglu_limit": 1.5,
    "rope_parameters": {**YARN_ROPE, "truncate": False},
}
# Families and settings whose layers are not all alike, or whose arithmetic is not a Llama's.
UNLIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, layer_types": ("Ministral", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": [_SLIDING, _FULL]}),
    "qwen2, layer_types": ("Qwen2", _QWEN_WINDOWS | {"layer_types": [_SLIDING, _FULL, _FULL, _SLIDING]}),
    "qwen2, max_window_layers": ("Qwen2", _QWEN_WINDOWS | {"max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 24, "attention_bias": True}),
    "qwen3, yarn, windows": ("Qwen3", _QWEN_WINDOWS | {"max_window_layers": 2, "rope_parameters": YARN_ROPE}),
    "gemma2": ("Gemma2", _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", _GEMMA | {"num_hidden_layers": 7, "rope_parameters": _GEMMA3_ROPES}),
    "gpt_oss": ("GptOss", _GPT_OSS),
}
_MODELS = {"Gemma3Text": "Gemma3ForCausalLM"}


def hf_model(family: str, settings: dict[str, Any]) -> Any:
    """Returns a random model whose norms, biases and sinks are random too."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**GEOMETRY | settings, attn_implementation="eager")
    model = getattr(transformers, _MODELS.get(family, f"{family}ForCausalLM"))(config).float().eval()
    randomise(model)
    return model


def randomise(model: Any) -> None:
    """Draws every parameter anew, none of them constant."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("_bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                # Experts are stored [in, out], linear layers [out, in].
                inputs = parameter.shape[-2] if parameter.ndim == 3 else parameter.shape[-1]
                parameter.normal_(std=inputs**-0.5)


def save(model: Any, directory: Path) -> None:
    """Writes the checkpoint; a Ministral, which is a Mistral that heeds its ``layer_types``, as a Mistral."""
    model.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if config["model_type"] == "ministral":
        path.write_text(json.dumps(config | {"model_type": "mistral"}))


def hf_logits(model: Any, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """The logits after every token, ``[T, vocab]``."""
    with torch.no_grad():
        return np.asarray(model(input_ids=torch.from_numpy(tokens)[None]).logits[0])


def hf_greedy(model: Any, tokens: NDArray[np.int64], count: int) -> list[int]:
    """The most likely continuation, ``count`` tokens."""
    prompt = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [int(token) for token in out[0, len(tokens) :]]
