"""The version of this package: what ``pyproject.toml`` says, beside the package or as it was installed."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

NAME = "fused-kv-engine"


def package_version() -> str:
    """The version, e.g. "0.1.0".

    A source tree need not be installed, and what is installed need not be this tree: its own file counts first.
    """
    path = Path(__file__).parents[1] / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == NAME:
            return str(project["version"])
    return version(NAME)
