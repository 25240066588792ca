"""Starts the processes of an engine, as ``python -m engine launch`` does, without its supervision."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Ended:
    """How a process ended: its exit code, by when, the JSON objects it printed, and what it said."""

    def __init__(self, process: subprocess.Popen[str], timeout: float) -> None:
        try:
            out, self.errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, self.errors = process.communicate()
            self.errors += f"\nstill ran after {timeout} s"
        self.code = process.returncode
        self.at = time.time()
        self.printed = [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def run_processes(count: int, *arguments: Any, devices: int = 1, timeout: float = 240) -> list[Ended]:
    """Runs ``process_program.py`` in ``count`` processes with ``devices`` virtual devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent / "serving"), str(HERE)])
    common = {"XLA_FLAGS": flags, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    if count > 1:
        common |= {"ENGINE_COORDINATOR": address, "ENGINE_PROCESSES": str(count)}
    start = time.monotonic()
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "process_program.py"), *(json.dumps(argument) for argument in arguments)],
            env=os.environ | common | ({"ENGINE_PROCESS": str(index)} if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    return [Ended(process, max(1.0, start + timeout - time.monotonic())) for process in started]
