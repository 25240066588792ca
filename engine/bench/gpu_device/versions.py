"""Section ``versions``: the device, and versions of the software."""

from __future__ import annotations

import functools
import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "torch", "triton", "numpy")
QUERIES = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def tasks(impl: str, *, small: bool) -> list[dict[str, Any]]:
    """One task; neither argument is used."""
    return [{}]


def prepare(task: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Returns the task's function; there is nothing to compile."""
    return functools.partial(_read, task)


def _read(task: dict[str, Any]) -> dict[str, Any]:
    import jax

    found: dict[str, Any] = {"python": sys.version.split()[0], "jax device": jax.devices()[0].device_kind}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={QUERIES}", "--format=csv,noheader"]
        values = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()[0].split(", ")
        found |= dict(zip(QUERIES.split(","), values, strict=True))
    return found


def line(task: dict[str, Any], result: dict[str, Any]) -> str:
    """All names and values, as a line."""
    return ", ".join(f"{name} {value}" for name, value in result.items())
