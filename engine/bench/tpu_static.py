"""Static figures of the TPU kernel, from the bundles that libtpu compiles without a TPU.

Predicated code counts as executed and stalls are not counted: compare the figures with the bytes-over-bandwidth floor.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from engine.bench.static_options import add_baseline_argument, add_shape_arguments, shape_of, shown, write_baseline
from engine.bench.tpu import baseline
from engine.bench.tpu.aot import TOPOLOGIES, compile_each
from engine.bench.tpu.libtpu import libtpu_version
from engine.bench.tpu.rival import REQUIREMENT, install
from engine.errors import BackendUnsupported
from engine.terminal import plain_console

OURS = "engine.bench.tpu.programs:compile_attention"
RIVAL = "engine.bench.tpu.rival:compile_rival"
# 32 sequences of 4,096 tokens, Llama 3 8B's heads, and enough new tokens for a whole block of queries.
DEFAULTS: dict[str, Any] = {
    "q_heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "dtype": "bfloat16",
    "tokens": 1024,
    "batch": 32,
    "context": 4096,
}
BASELINE = Path("tests/attention_tpu/static_baseline.json")


def measure(shapes: list[dict[str, Any]], target: str = OURS) -> list[dict[str, Any]]:
    """Compiles each shape, all in one process, and returns sizes and figures; ``DEFAULTS`` has unset values.

    Raises:
        BackendUnsupported: there is no libtpu, or a shape does not compile.
    """
    found = []
    with plain_console(stderr=True).status("compiling") as status:
        for shape, result in zip(shapes, compile_each(target, [DEFAULTS | s for s in shapes], dump=True), strict=True):
            if "failed" in result:
                raise BackendUnsupported(f"{target} for {shape} does not compile:\n{result['failed']}")
            found.append(result)
            status.update(f"compiled {len(found)} of {len(shapes)}")
    return found


def measure_rival(shape: dict[str, Any]) -> dict[str, Any]:
    """Like ``measure``, for tpu-inference's kernel; prefill blocks are halved where its defaults do not fit VMEM."""
    site = {"site": str(install())}
    try:
        return measure([shape | site], RIVAL)[0]
    except BackendUnsupported as error:
        if "memory space vmem" not in str(error):
            raise
        fact = f"{REQUIREMENT}: its default prefill blocks do not fit the VMEM of {shape['gen']}"
        plain_console(stderr=True).print(f"{fact}; compiling it with half of each")
        return measure([shape | site | {"shrink": 2}], RIVAL)[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("--gen", choices=TOPOLOGIES, default="v6e")
    parser.add_argument("--mode", choices=("both", "decode", "prefill"), default="both", help="which figures to print")
    add_shape_arguments(parser, DEFAULTS, page_size=128, dtype_of="the cache")
    parser.add_argument(
        "--rival", action="store_true", help=f"also fetch {REQUIREMENT} from PyPI, compile it, and print ours over it"
    )
    add_baseline_argument(parser, BASELINE, "libtpu")


def run(args: argparse.Namespace) -> None:
    """Prints one figure per line, or writes the baseline."""
    version = libtpu_version()
    if args.write_baseline:
        found = measure(list(baseline.SHAPES.values()))
        figures = dict(zip(baseline.SHAPES, found, strict=True))
        write_baseline(args.write_baseline, version, figures, baseline.GUARDED)
        print(f"{len(found)} shapes written to {args.write_baseline} for libtpu {version}")
        return
    shape = {"gen": args.gen} | shape_of(args)
    ours = measure([shape])[0]
    theirs = measure_rival(shape) if args.rival else {}
    title = (
        f"{args.gen}, page {args.page}, {args.q_heads} query and {args.kv_heads} KV heads of {args.head_dim}, "
        f"{args.dtype}; jax {jax.__version__}, libtpu {version}, {datetime.date.today()}"
    )
    _print(title, {name: ours[name] for name in ours if _wanted(name, args.mode)}, theirs)
    for what in ("moves", "query moves"):
        for move in ours[what]:
            print(f"{what}: {move}")


def _wanted(name: str, mode: str) -> bool:
    other = {"decode": "prefill", "prefill": "decode"}.get(mode, "nothing")
    return not name.endswith("moves") and not name.startswith(other)


def _print(title: str, ours: dict[str, float], theirs: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    columns = ["ours", REQUIREMENT.replace("==", " "), "ours over theirs"] if theirs else ["ours"]
    for column in columns:
        table.add_column(column, justify="right")
    for name, value in ours.items():
        cells = [shown(value)]
        if theirs:
            rival = theirs.get(name)
            ratio = "" if rival is None or not rival else f"{value / rival:.2f}"
            cells += ["" if rival is None else shown(rival), ratio]
        table.add_row(name, *cells)
    plain_console(width=120).print(table)
    if "prefill blocks" in theirs:
        print("their prefill blocks (queries, keys fetched, queries and keys computed):", *theirs["prefill blocks"])
