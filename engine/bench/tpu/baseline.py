"""Compares static figures with a baseline per compiler version, to detect changes that make the kernel worse."""

from __future__ import annotations

from typing import Any

from engine.bench.static_options import Figures

SHAPES: dict[str, dict[str, Any]] = {
    "v6e page 128": {"gen": "v6e", "page_size": 128},
    "v6e page 16": {"gen": "v6e", "page_size": 16},
    "v7x page 128": {"gen": "v7x", "page_size": 128},
    "v5e page 128": {"gen": "v5e", "page_size": 128},
    "v6e page 128, 8 query heads and 1 KV head": {"gen": "v6e", "page_size": 128, "q_heads": 8, "kv_heads": 1},
    "v6e page 128, float8": {"gen": "v6e", "page_size": 128, "dtype": "float8_e4m3fn"},
}
ALLOWED = 0.10
SLACK_SPILLS = 64  # noise of the register allocator, not a change of the kernel
SLACK_VMEM_BYTES = 1 << 20
# For each compared figure, the direction that is better, and how much of it is noise.
GUARDED = {
    "decode bundles per token": (-1, 0),
    "prefill FLOPs per bundle": (+1, 0),
    "decode hot loop spills": (-1, SLACK_SPILLS),
    "prefill hot loop spills": (-1, SLACK_SPILLS),
    "VMEM bytes": (-1, SLACK_VMEM_BYTES),
}


def regressions(expected: Figures, found: Figures) -> list[str]:
    """The figures that are worse than the baseline by more than ``ALLOWED`` and their slack, one line each.

    A figure that the baseline has and ``found`` lacks is a regression too.
    """
    worse = []
    for name, (better, slack) in GUARDED.items():
        before, now = expected[name], found.get(name)
        if now is None or better * (before - now) > before * ALLOWED + slack:
            worse.append(f"{name}: {before:,.2f} before, {'nothing' if now is None else f'{now:,.2f}'} now")
    return worse
