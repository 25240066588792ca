"""Plots the rate at which decode reads the cache, by context and by batch size, with the rivals of the same run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from engine.bench.attention import Problem, measure

CONTEXTS = (256, 512, 1024, 2048, 4096)  # tokens, at BATCH sequences
BATCHES = (1, 2, 4, 8, 16, 32)  # sequences, of CONTEXT tokens
BATCH, CONTEXT = 8, 1024


def draw(problem: Problem, impl: str, rounds: int, directory: Path) -> None:
    """Measures decode over contexts and batch sizes and writes ``attention-bandwidth.png``.

    Args:
        problem: heads, page size and dtype.
        impl: this package's implementation.
        rounds: measured rounds per point.
        directory: where the file goes; made if it does not exist.
    """
    figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    decode = dataclasses.replace(problem, q_len=1)
    by_context = [dataclasses.replace(decode, batch=BATCH, context=context) for context in CONTEXTS]
    by_batch = [dataclasses.replace(decode, batch=batch, context=CONTEXT) for batch in BATCHES]
    _curves(left, f"context, tokens ({BATCH} sequences)", CONTEXTS, by_context, impl, rounds)
    _curves(right, f"batch, sequences ({CONTEXT:,} tokens each)", BATCHES, by_batch, impl, rounds)
    left.set_ylabel("K and V read, GB/s")
    left.set_ylim(bottom=0)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    heads = f"{problem.q_heads} query / {problem.kv_heads} KV heads of {problem.head_dim}"
    where = f"page size {problem.page_size}; jax {jax.__version__} on {jax.default_backend()}"
    figure.suptitle(f"decode, {heads}, {problem.dtype}, {where}", fontsize=10)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "attention-bandwidth.png"
    figure.savefig(path)
    print(f"drew {path}")


def _curves(axes: Any, label: str, sizes: tuple[int, ...], problems: list[Problem], impl: str, rounds: int) -> None:
    """One panel: one curve per contender, and the rate of a plain read of a buffer at each point."""
    curves: dict[str, list[float]] = {}
    for problem in problems:
        timings, bandwidth = measure(problem, {f"ours ({impl})": impl, "xla": "xla"}, rounds)
        for name, timing in timings.items():
            curves.setdefault(name, []).append(problem.context_bytes() / timing.median / 1e9)
        curves.setdefault("plain read", []).append(bandwidth / 1e9)
    for name, values in curves.items():
        is_bound = name == "plain read"
        axes.plot(
            sizes, values, "--" if is_bound else "-o", color="0.6" if is_bound else None, label=name, markersize=4
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
