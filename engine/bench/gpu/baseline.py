"""Static figures kept by the version of jax, so that a change which makes a kernel worse is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    "decode instructions a step", "prefill instructions a step", "prefill instructions a masked step", "launches"
)  # fmt: skip

Figures = dict[str, float]


def read(path: Path, version: str) -> dict[str, Figures]:
    """Figures by shape that were written for this version of jax; empty where none were."""
    table: dict[str, dict[str, Figures]] = json.loads(path.read_text()) if path.exists() else {}
    return table.get(version, {})


def write(path: Path, version: str, found: dict[str, dict[str, Any]]) -> None:
    """Writes what is guarded of ``found`` for this version, and leaves the other versions as they are."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table[version] = {shape: {name: figures[name] for name in GUARDED} for shape, figures in sorted(found.items())}
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


def regressions(expected: Figures, found: dict[str, Any]) -> list[str]:
    """What is worse than the baseline by more than ``ALLOWED``, one line each."""
    return [
        f"{name}: {expected[name]:,.0f} before, {found[name]:,.0f} now"
        for name in GUARDED
        if found[name] > expected[name] * (1 + ALLOWED)
    ]
