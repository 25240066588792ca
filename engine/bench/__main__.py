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
        benchmarks = {name: _benchmark(name) for name in NAMES}
    parser = argparse.ArgumentParser(prog="python -m engine.bench", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True)
    for name, module in benchmarks.items():
        summary = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(names.add_parser(name, help=summary, description=module.__doc__))
    args = parser.parse_args()
    leave(run_command(lambda: benchmarks[args.name].run(args)))


def _benchmark(name: str) -> ModuleType:
    return importlib.import_module(f"engine.bench.{MODULES.get(name, name.replace('-', '_'))}")


if __name__ == "__main__":
    main()
