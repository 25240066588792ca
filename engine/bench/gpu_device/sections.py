"""The sections in the order in which they run: what tells most comes first."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Section:
    """A part of the benchmark.

    Attributes:
        name: on the command line; also that of its module.
        patience: seconds without a word after which a running task is given up.
        compiles_ahead: whether all its tasks are compiled, side by side, before the first is timed.
    """

    name: str
    patience: float = 30.0
    compiles_ahead: bool = False

    @property
    def module(self) -> Any:
        """What has ``tasks``, ``prepare`` and ``line``."""
        return importlib.import_module(f"engine.bench.gpu_device.{self.name}")


SECTIONS = (
    Section("versions"),
    Section("ceilings", patience=60.0),
    Section("correctness"),
    Section("decode", compiles_ahead=True),
    Section("prefill", compiles_ahead=True),
    Section("sdpa", patience=60.0),
    Section("scatter", compiles_ahead=True),
    Section("layers", compiles_ahead=True),
    Section("profile", patience=60.0, compiles_ahead=True),
    Section("flex", patience=120.0),  # torch compiles while it runs
)


def section_named(name: str) -> Section:
    """One of ``SECTIONS``."""
    return next(section for section in SECTIONS if section.name == name)
