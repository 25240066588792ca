"""Common parts of ``gpu-static`` and ``tpu-static``: options for the shape, and baselines by compiler version."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.terminal import count

Figures = dict[str, float]


def add_shape_arguments(
    parser: argparse.ArgumentParser, defaults: Mapping[str, Any], *, page_size: int, dtype_of: str
) -> None:
    """Declares page size, heads and dtype; ``shape_of`` reads them."""
    parser.add_argument("--page", type=count, default=page_size, help="tokens per page")
    parser.add_argument("--q-heads", type=count, default=defaults["q_heads"])
    parser.add_argument("--kv-heads", type=count, default=defaults["kv_heads"])
    parser.add_argument("--head-dim", type=count, default=defaults["head_dim"])
    parser.add_argument("--dtype", default=defaults["dtype"], help=f"of {dtype_of}")


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    """The shape on the command line, as keyword arguments of the compiling functions."""
    return {
        "page_size": args.page,
        "q_heads": args.q_heads,
        "kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "dtype": args.dtype,
    }


def add_baseline_argument(parser: argparse.ArgumentParser, path: Path, compiler: str) -> None:
    """Declares ``--write-baseline``."""
    parser.add_argument(
        "--write-baseline",
        type=Path,
        nargs="?",
        const=path,
        metavar="FILE",
        help=f"measure the shapes that the tests check and write the baseline of this {compiler} (default: %(const)s)",
    )


def read_baseline(path: Path, version: str) -> dict[str, Figures]:
    """The figures by shape in the baseline of this version of the compiler; empty where there are none."""
    table: dict[str, dict[str, Figures]] = json.loads(path.read_text()) if path.exists() else {}
    return table.get(version, {})


def write_baseline(path: Path, version: str, found: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> None:
    """Writes the figures of these names for this version, and keeps those of other versions."""
    table = json.loads(path.read_text()) if path.exists() else {}
    kept = list(names)
    table[version] = {shape: {name: round(figures[name], 3) for name in kept} for shape, figures in found.items()}
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


def shown(value: float) -> str:
    """A figure as the tables print it."""
    return f"{value:,.3f}" if abs(value) < 100 and value != int(value) else f"{value:,.0f}"
