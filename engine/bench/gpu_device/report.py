"""The results of all tasks, saved to a JSON file after every task."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Report:
    """Results of all sections so far.

    Attributes:
        found: entries by section, one per task: ``task`` and either ``result``, ``error`` or ``skipped``.
    """

    def __init__(self, path: Path | None) -> None:
        self.found: dict[str, list[Entry]] = {}
        self._path = path

    def add(self, section: str, task: dict[str, Any], outcome: dict[str, Any]) -> Entry:
        """Adds the outcome of a task, and writes the file."""
        entry = {"task": task, **outcome}
        self.found.setdefault(section, []).append(entry)
        self.write()
        return entry

    def write(self) -> None:
        """Writes the file, if there is one, so that it is whole at any time."""
        if self._path is not None:
            beside = self._path.with_suffix(".part")
            beside.write_text(json.dumps({"date": str(datetime.date.today()), "sections": self.found}, indent=1))
            beside.replace(self._path)

    def results(self, section: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The tasks that succeeded, with their results."""
        return [(entry["task"], entry["result"]) for entry in self.found.get(section, []) if "result" in entry]
