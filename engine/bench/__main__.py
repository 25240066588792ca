"""``python -m engine.bench NAME``: ratios measured side by side in one run, or counts of a compiled program."""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType

from engine.terminal import leave, loading, run_command

NAMES = (
    "allocator",
    "attention",
    "gpu",
    "gpu-static",
    "groups",
    "pods",
    "prefix",
    "quality",
    "scaling",
    "scatter",
    "serve",
    "server",
    "step",
    "tpu-static",
    "tune",
    "window",
)
MODULES = {"gpu": "gpu_device.command"}  # where the module's name is not the benchmark's


def main() -> None:
    """Parses the command line and runs one benchmark."""
    with loading():
        parser = make_parser()
    args = parser.parse_args()
    leave(run_command(lambda: args.run(args)))


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line, with a command for each benchmark."""
    parser = argparse.ArgumentParser(prog="python -m engine.bench", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True)
    for name in NAMES:
        module = _benchmark(name)
        summary = (module.__doc__ or "").splitlines()[0]
        command = names.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _benchmark(name: str) -> ModuleType:
    return importlib.import_module(f"engine.bench.{MODULES.get(name, name.replace('-', '_'))}")


if __name__ == "__main__":
    main()
