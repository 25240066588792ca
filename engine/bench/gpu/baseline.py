"""Compares static figures with a baseline per jax version, to detect changes that make a kernel worse."""

from __future__ import annotations

from typing import Any

from engine.bench.static_options import Figures

SHAPES: dict[str, dict[str, Any]] = {
    "h100 page 16": {"page_size": 16},
    "h100 page 64": {"page_size": 64},
    "h200 page 64, 64 query and 8 KV heads of 64": {
        "target": "h200", "page_size": 64, "q_heads": 64, "kv_heads": 8, "head_dim": 64,
    },
    "h100 page 16, 8 query heads and 1 KV head, float16": {
        "page_size": 16, "q_heads": 8, "kv_heads": 1, "dtype": "float16",
    },
}  # fmt: skip
ALLOWED = 0.05
GUARDED = (
    "decode instructions per step", "prefill instructions per step", "prefill instructions per masked step", "launches"
)  # fmt: skip


def regressions(expected: Figures, found: dict[str, Any]) -> list[str]:
    """The figures that are worse than the baseline by more than ``ALLOWED``, one line each."""
    return [
        f"{name}: {expected[name]:,.0f} before, {found[name]:,.0f} now"
        for name in GUARDED
        if found[name] > expected[name] * (1 + ALLOWED)
    ]
