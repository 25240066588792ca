"""The version of this package: that of ``pyproject.toml`` beside the package, else the installed one."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

NAME = "fused-kv-engine"


def package_version() -> str:
    """The version, e.g. "0.1.0".

    The source tree's own file comes first: the tree need not be installed, and another version may be.
    """
    path = Path(__file__).parents[1] / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == NAME:
            return str(project["version"])
    return version(NAME)
