"""Decode steps of large models on pods, compiled without a TPU: bytes as planned, and the bandwidth floor.

A decode step of every replica is compiled with the TPU kernel, two buffers and the layers that lie in them: two of a
model whose layers are alike. Figures of the whole model are by the plan's own arithmetic for all layers.
"""

from __future__ import annotations

import argparse
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from engine.bench.tpu.aot import compile_each
from engine.bench.tpu.libtpu import libtpu_version
from engine.config import read_toml
from engine.errors import ConfigError
from engine.planning.units import format_bytes
from engine.terminal import count, plain_console

SOURCES = Path(__file__).parents[2]
CONFIGS = SOURCES / "configs"
TARGET = "engine.bench.tpu.pod:compile_pod"
BEGIN, END = "<!-- written by python -m engine.bench pods --write -->", "<!-- end -->"
HEADER = (
    "pod", "model", "mesh", "weights per device", "KV per device", "sequences per pod",
    "HBM bytes per step and device", "floor", "sent per step and device", "compiled as planned",
)  # fmt: skip


@dataclass(frozen=True)
class Pod:
    """A TPU slice.

    Attributes:
        name: the usual name.
        topology: the name in libtpu.
        device_bytes: memory of one JAX device; a v7x chip is two devices.
        bandwidth: bytes per second of that memory.
    """

    name: str
    topology: str
    device_bytes: int
    bandwidth: float


PODS = (
    Pod("v5e 2x4", "v5e:2x4", 16 << 30, 0.82e12),
    Pod("v6e 4x4", "v6e:4x4", 32 << 30, 1.64e12),
    Pod("v7x 2x2x2", "tpu7x:2x2x2", 96 << 30, 3.7e12),
    Pod("v5e 16x16", "v5e:16x16", 16 << 30, 0.82e12),
)


@dataclass(frozen=True)
class Served:
    """A model, and what is compiled of it.

    Attributes:
        name: the usual name.
        config: the file in ``configs/`` with its geometry.
        layers: the first layers, compiled: so many that their groups have two each.
        generations: of the TPUs that it is compiled for.
    """

    name: str
    config: str
    layers: int = 2
    generations: tuple[str, ...] = ("v5e", "v6e", "v7x")


MODELS = (
    Served("Llama 3 8B", "llama-3-8b"),
    Served("Llama 3 70B", "llama-3-70b"),
    Served("Gemma 3 27B", "gemma-3-27b", 12, ("v6e", "v7x")),
    Served("gpt-oss 20B", "gpt-oss-20b", 4, ("v6e", "v7x")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("--rows", type=count, default=32, help="sequences that each replica decodes")
    parser.add_argument("--context", type=count, default=4096, help="tokens per sequence")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=SOURCES / "docs/scaling.md", metavar="FILE",
        help="put the tables into this page (default: %(const)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Compiles for every pod and model, and prints or writes the tables.

    Raises:
        BackendUnsupported: there is no libtpu.
        ConfigError: this is no source tree, or the page cannot be written.
    """
    version = libtpu_version()  # raises now and not after minutes of work
    if not CONFIGS.is_dir():
        raise ConfigError(f"pods reads the geometries in {CONFIGS}, which only a source tree has; run it in one")
    if args.write and not args.write.parent.is_dir():
        raise ConfigError(f"cannot write {args.write}: {args.write.parent} is not a directory; make it or name another")
    models = {served.name: read_toml(CONFIGS / f"{served.config}.toml")["model"] for served in MODELS}
    pairs = [(pod, served) for pod in PODS for served in MODELS if pod.name.split()[0] in served.generations]
    cases = [
        {"topology": pod.topology, "model": models[served.name], "layers": served.layers, "rows": args.rows,
         "device_bytes": pod.device_bytes, "context": args.context}
        for pod, served in pairs
    ]  # fmt: skip
    rows, exchanged = [], []
    with plain_console(stderr=True).status("compiling") as status:
        for (pod, served), found in zip(pairs, compile_each(TARGET, cases), strict=True):
            rows.append(describe(pod, served.name, models[served.name], args.rows, found))
            exchanged.append(f"* {pod.name}, {served.name}, {served.layers} layers: {collectives(found)}")
            status.update(f"compiled {len(rows)} of {len(pairs)}")
    page = "\n".join([
        f"jax {jax.__version__}, libtpu {version}, {datetime.date.today()}; each replica decodes {args.rows} "
        f"sequences of {args.context:,} tokens, bfloat16, pages of 128.\n",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(row) + " |" for row in rows),
        "\nCollectives of the compiled programs:\n",
        *exchanged,
    ])  # fmt: skip
    if args.write is None:
        print(page)
        return
    replace_tables(args.write, page)
    print(f"{len(rows)} rows written to {args.write}")


def describe(pod: Pod, name: str, model: dict[str, Any], rows: int, found: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table, from what ``compile_pod`` found."""
    if "failed" in found:
        return (pod.name, name, *[""] * (len(HEADER) - 3), f"no: {found['failed'][:80]}")
    tp = found["tp"]
    mesh = f"tensor {tp} x data {found['dp']}"
    weights = found["model weight bytes"]
    head = (pod.name, name, mesh, format_bytes(weights))
    compiled = faults(found) or "yes"
    if not found["sequences"]:
        return (*head, f"none: a device has {format_bytes(pod.device_bytes)}", *[""] * 4, compiled)
    read = weights - found["unread bytes"] + found["context bytes"]
    # A ring moves each byte of an all-reduce 2 (tp - 1) / tp times; one follows each embedding, attention and MLP.
    reduces = 1 + 2 * model["num_hidden_layers"]
    sent = reduces * rows * model["hidden_size"] * 2 * 2 * (tp - 1) // tp
    return (
        *head, format_bytes(found["model pool bytes"]), f"{found['sequences']:,}", format_bytes(read),
        f"{read / pod.bandwidth * 1e3:.2f} ms", format_bytes(sent), compiled,
    )  # fmt: skip


def faults(found: dict[str, Any]) -> str:
    """How the compiled program differs from the plan; empty where it does not."""
    integers = found["argument bytes"] - found["weight bytes"] - found["pool bytes"]
    wrong = []
    if not 0 <= integers < 1 << 20:
        wrong.append(f"{integers:,} bytes of arguments beside weights and pool")
    if found["aliased arrays"] != found["donated arrays"] or found["alias bytes"] < found["pool bytes"]:
        wrong.append("pool not in place")
    if found["temporary bytes"] > found["pool bytes"] / 8:
        wrong.append(f"{format_bytes(found['temporary bytes'])} of temporaries")
    return "; ".join(wrong + found["moves"])


def collectives(found: dict[str, Any]) -> str:
    """The collectives of the program, as text."""
    if "failed" in found:
        return "not compiled"
    return ", ".join(f"{count} {name}" for name, count in found["collectives"].items()) or "none"


def replace_tables(path: Path, page: str) -> None:
    """Puts ``page`` between the two markers of a document, or at its end."""
    text = path.read_text() if path.exists() else "# Scaling\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before.rstrip()}\n\n{BEGIN}\n\n{page}\n\n{END}\n{after.lstrip()}")
