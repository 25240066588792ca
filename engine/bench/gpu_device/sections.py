"""The sections in the order in which they run: the most informative first."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Section:
    """A part of the benchmark.

    Attributes:
        name: its name on the command line and the name of its module.
        limit: seconds for all its tasks, so that repeated hangs leave time for other sections.
        patience: seconds without output after which a running task is given up.
        compiles_ahead: whether all its tasks are compiled, in parallel, before the first is timed.
        workers: number of processes that share the tasks, where nothing is timed; a compile runs mostly in Python, so
            each process compiles one task at a time.
    """

    name: str
    limit: float = 90.0
    patience: float = 30.0
    compiles_ahead: bool = False
    workers: int = 1

    @property
    def module(self) -> Any:
        """The module with ``tasks``, ``prepare`` and ``line``."""
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
    """The section of ``SECTIONS`` with this name."""
    return next(section for section in SECTIONS if section.name == name)
