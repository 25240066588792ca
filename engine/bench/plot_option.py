"""The option ``--plot`` of a measurement."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from engine.errors import ConfigError

DIRECTORY = Path("docs/img")


def add_plot_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Declares ``--plot [DIR]``, which says where pictures go; ``what`` says what it does."""
    text = f"also {what} (the extra plot); default: {DIRECTORY}"
    parser.add_argument("--plot", type=Path, nargs="?", const=DIRECTORY, metavar="DIR", help=text)


def require_matplotlib(args: argparse.Namespace) -> None:
    """Raises ConfigError where a plot is wanted and matplotlib is not installed, before anything is measured."""
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; install it, or this package with [plot]")
