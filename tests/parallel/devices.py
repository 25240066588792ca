"""Runs a test program in a process of its own, because the number of virtual devices is fixed when jax starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run_on_devices(program: str, *arguments: Any, devices: int = 8, timeout: float = 280) -> list[dict[str, Any]]:
    """Runs ``program`` beside this file; returns the JSON objects that it printed, a line each."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    paths = [str(HERE.parents[1]), *(str(HERE.parent / room) for room in ("serving", "attention", "models")), str(HERE)]
    run = subprocess.run(
        [sys.executable, str(HERE / program), *(json.dumps(argument) for argument in arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
