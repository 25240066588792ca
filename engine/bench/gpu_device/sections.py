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
        limit: seconds for all its tasks, so that what hangs again and again leaves time for others.
        patience: seconds without a word after which a running task is given up.
        compiles_ahead: whether all its tasks are compiled, side by side, before the first is timed.
        workers: processes that share the tasks, where nothing is timed: a compile is mostly Python, one a process.
    """

    name: str
    limit: float = 90.0
    patience: float = 30.0
    compiles_ahead: bool = False
    workers: int = 1

    @property
    def module(self) -> Any:
        """What has ``tasks``, ``prepare`` and ``line``."""
        return importlib.import_module(f"engine.bench.gpu_device.{self.name}")


SECTIONS = (
    Section("versions", limit=40),
    Section("ceilings", limit=60),
    Section("correctness", limit=150, workers=4),
    Section("decode", compiles_ahead=True),
    Section("prefill", limit=120, compiles_ahead=True),
    Section("sdpa", limit=60),
    Section("scatter", limit=60, compiles_ahead=True),
    Section("layers", compiles_ahead=True),
    Section("profile", limit=60, compiles_ahead=True),
    Section("flex", limit=180, patience=120),  # torch compiles while it runs
)


def section_named(name: str) -> Section:
    """One of ``SECTIONS``."""
    return next(section for section in SECTIONS if section.name == name)
