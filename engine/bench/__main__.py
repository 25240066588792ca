"""``python -m engine.bench NAME``: ratios measured side by side in one run, or counts of a compiled program."""

from __future__ import annotations

import argparse
import sys

from engine.bench import allocator, attention, pods, prefix, scaling, scatter, serve, step, tpu_static, tune
from engine.errors import EngineError

BENCHMARKS = {
    "allocator": allocator,
    "attention": attention,
    "pods": pods,
    "prefix": prefix,
    "scaling": scaling,
    "scatter": scatter,
    "serve": serve,
    "step": step,
    "tpu-static": tpu_static,
    "tune": tune,
}


def main() -> None:
    """Parses the command line and runs one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m engine.bench", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True)
    for name, module in BENCHMARKS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(names.add_parser(name, help=summary, description=module.__doc__))
    args = parser.parse_args()
    try:
        BENCHMARKS[args.name].run(args)
    except EngineError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
