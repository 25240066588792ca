"""Static figures of the GPU kernels, from machine code that is compiled without a GPU.

Every branch of a loop counts as taken, and waiting is not counted. Compare the figures with what the memory and the
matrix unit allow, and with those of jax's own FlashAttention-3, compiled in the same way.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from engine.bench.gpu import baseline
from engine.bench.gpu.aot import TARGETS, compile_each
from engine.bench.static_options import add_baseline_argument, add_shape_arguments, shape_of, shown, write_baseline
from engine.errors import BackendUnsupported
from engine.terminal import plain_console

OURS = "engine.bench.gpu.programs:compile_attention"
YARDSTICK = "engine.bench.gpu.programs:compile_yardstick"
# 32 sequences of 4,096 tokens and Llama 3 8B's heads.
DEFAULTS: dict[str, Any] = {
    "target": "h100",
    "q_heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "dtype": "bfloat16",
    "tokens": 1024,
    "batch": 32,
    "context": 4096,
}
BASELINE = Path("tests/attention_gpu/static_baseline.json")


def measure(shapes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compiles our kernels for each shape and returns their sizes and costs; ``DEFAULTS`` has unset values.

    Raises:
        BackendUnsupported: there is no compiler, or a shape does not compile.
    """
    return _compiled(OURS, [DEFAULTS | shape for shape in shapes])


def measure_yardstick(shape: dict[str, Any]) -> dict[str, Any]:
    """The same figures of jax's own FlashAttention-3, which computes prefill of one dense sequence."""
    known = {name: (DEFAULTS | shape)[name] for name in ("target", "q_heads", "kv_heads", "head_dim")}
    return _compiled(YARDSTICK, [known | {"tokens": DEFAULTS["context"]}])[0]


def _compiled(target: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    with plain_console(stderr=True).status("compiling"):
        for case, result in zip(cases, compile_each(target, cases), strict=True):
            if "failed" in result:
                raise BackendUnsupported(f"{target} for {case} does not compile:\n{result['failed']}")
            found.append(result)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("--target", choices=TARGETS, default=DEFAULTS["target"])
    add_shape_arguments(parser, DEFAULTS, page_size=16, dtype_of="queries and cache")
    add_baseline_argument(parser, BASELINE, "jax")


def run(args: argparse.Namespace) -> None:
    """Prints one figure per line, or writes the baseline."""
    if args.write_baseline:
        found = measure(list(baseline.SHAPES.values()))
        figures = dict(zip(baseline.SHAPES, found, strict=True))
        write_baseline(args.write_baseline, jax.__version__, figures, baseline.GUARDED)
        print(f"{len(found)} shapes written to {args.write_baseline} for jax {jax.__version__}")
        return
    shape = {"target": args.target} | shape_of(args)
    ours, theirs = measure([shape])[0], measure_yardstick(shape)
    print_tables(args, ours, theirs)


def print_tables(args: argparse.Namespace, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Prints the cost of the loops, ours and jax's, and the resources of each kernel."""
    title = (
        f"{args.target}, page {args.page}, {args.q_heads} query and {args.kv_heads} KV heads of {args.head_dim}, "
        f"{args.dtype}; jax {jax.__version__}, {datetime.date.today()}"
    )
    costs = Table("figure", title=title, title_justify="left")
    for column in ("ours", "jax's own FA3", "ours over theirs"):
        costs.add_column(column, justify="right")
    for name, value in ours.items():
        if isinstance(value, int | float):
            other = theirs.get(name) if name.startswith("prefill") else None
            costs.add_row(
                name, shown(value), "" if other is None else shown(other), f"{value / other:.2f}" if other else ""
            )
    takes = Table("kernel", title="of each kernel", title_justify="left")
    for column in ("registers", "spilled bytes", "shared bytes"):
        takes.add_column(column, justify="right")
    for name, kernel in (ours["kernels"] | theirs["kernels"]).items():
        takes.add_row(name, *(f"{kernel[column]:,}" for column in ("registers", "spilled bytes", "shared bytes")))
    console = plain_console(width=120)
    console.print(costs)
    console.print(takes)
    for move in ours["moves"]:
        print(f"moves the cache: {move}")
