"""Forward passes of the families in float64 and plain NumPy, from the tensors of a checkpoint: one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


class Forward:
    """One sequence through a model; written from the published descriptions, and shares no code with the package.

    Args:
        tensors: a checkpoint, by the names that it has on disk.
        config: the ``config.json`` of it.
    """

    def __init__(self, tensors: dict[str, Any], config: dict[str, Any]) -> None:
        self.tensors = {name: np.asarray(tensors[name], np.float64) for name in tensors}
        self.config, self.kind = config, config["model_type"]

    def logits(self, tokens: list[int]) -> Numbers:
        """``[T, vocab]``."""
        embedding = self.tensors["model.embed_tokens.weight"]
        x = embedding[tokens]
        if self.is_gemma:
            x = x * np.sqrt(self.config["hidden_size"])
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            out = self.attention(layer, self.norm(f"{name}.input_layernorm", x))
            if self.is_gemma:
                x = x + self.norm(f"{name}.post_attention_layernorm", out)
                out = self.mlp(layer, self.norm(f"{name}.pre_feedforward_layernorm", x))
                x = x + self.norm(f"{name}.post_feedforward_layernorm", out)
            else:
                x = x + out
                x = x + self.mlp(layer, self.norm(f"{name}.post_attention_layernorm", x))
        x = self.norm("model.norm", x) @ self.tensors.get("lm_head.weight", embedding).T
        cap = self.config.get("final_logit_softcapping")
        return np.tanh(x / cap) * cap if cap else x

    @property
    def is_gemma(self) -> bool:
        return self.kind.startswith("gemma")

    def norm(self, name: str, x: Numbers) -> Numbers:
        weight = self.tensors[f"{name}.weight"] + (1.0 if self.is_gemma else 0.0)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * weight

    def linear(self, name: str, x: Numbers) -> Numbers:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)

    def attention(self, layer: int, x: Numbers) -> Numbers:
        name, config = f"model.layers.{layer}.self_attn", self.config
        windowed = config["layer_types"][layer] == "sliding_attention"
        q, k, v = (self.linear(f"{name}.{p}_proj", x).reshape(len(x), -1, config["head_dim"]) for p in "qkv")
        if f"{name}.q_norm.weight" in self.tensors:
            q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        q, k = (self.turned(heads, windowed=windowed) for heads in (q, k))
        scale = config.get("query_pre_attn_scalar", config["head_dim"]) ** -0.5
        out = np.zeros_like(q)
        for token in range(len(x)):
            first = max(0, token - config["sliding_window"] + 1) if windowed else 0
            for head in range(q.shape[1]):
                served = head * k.shape[1] // q.shape[1]
                scores = k[first : token + 1, served] @ q[token, head] * scale
                if cap := config.get("attn_logit_softcapping"):
                    scores = np.tanh(scores / cap) * cap
                weights = np.exp(scores)
                sinks = self.tensors.get(f"{name}.sinks")
                total = weights.sum() + (0.0 if sinks is None else np.exp(sinks[head]))
                out[token, head] = weights @ v[first : token + 1, served] / total
        return self.linear(f"{name}.o_proj", out.reshape(len(x), -1))

    def turned(self, heads: Numbers, *, windowed: bool) -> Numbers:
        """Each pair as a complex number, times that of its angle."""
        local = self.config.get("rope_local_base_freq") if windowed else None
        theta, rule = self.config["rope_theta"], self.config.get("rope_scaling")
        half = heads.shape[-1] // 2
        frequencies = (local or theta) ** (-np.arange(half) / half)
        size = 1.0
        if rule and not local:
            frequencies, size = self.stretched(frequencies, theta, rule)
        pairs = heads[..., :half] + 1j * heads[..., half:]
        pairs = pairs * size * np.exp(1j * np.arange(len(heads))[:, None, None] * frequencies)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    @staticmethod
    def stretched(frequencies: Numbers, theta: float, rule: dict[str, Any]) -> tuple[Numbers, float]:
        if rule["rope_type"] == "linear":
            return frequencies / rule["factor"], 1.0
        assert rule["rope_type"] == "yarn"
        assert not rule["truncate"]
        # Turns in the old context, and where between the two betas they lie on the scale of exponents.
        turns = rule["original_max_position_embeddings"] * frequencies / (2 * np.pi)
        fast, slow = np.log(rule["beta_fast"]), np.log(rule["beta_slow"])
        kept = np.clip((np.log(turns) - slow) / (fast - slow), 0, 1)
        return frequencies * (kept + (1 - kept) / rule["factor"]), 1 + np.log(rule["factor"]) / 10

    def mlp(self, layer: int, x: Numbers) -> Numbers:
        name = f"model.layers.{layer}.mlp"
        if f"{name}.router.weight" in self.tensors:
            return np.stack([self.experts(name, token) for token in x])
        gate = self.linear(f"{name}.gate_proj", x)
        if self.is_gemma:
            gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        return self.linear(f"{name}.down_proj", gate * self.linear(f"{name}.up_proj", x))

    def experts(self, name: str, x: Numbers) -> Numbers:
        """The mixture for one token: only the chosen experts are computed."""
        logits, limit = self.linear(f"{name}.router", x), self.config["swiglu_limit"]
        chosen = np.argsort(-logits)[: self.config["num_experts_per_tok"]]
        shares = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        part = {key.removeprefix(f"{name}.experts."): self.tensors[key] for key in self.tensors if name in key}
        out = np.zeros_like(x)
        for expert, share in zip(chosen, shares, strict=True):
            both = x @ part["gate_up_proj"][expert] + part["gate_up_proj_bias"][expert]
            gate, up = np.minimum(both[0::2], limit), np.clip(both[1::2], -limit, limit)
            inner = gate / (1 + np.exp(-self.config["swiglu_alpha"] * gate)) * (up + 1)
            out += share * (inner @ part["down_proj"][expert] + part["down_proj_bias"][expert])
        return out
