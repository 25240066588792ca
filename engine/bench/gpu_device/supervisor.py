"""Runs tasks in a worker process, and outlives it: a task that kills or hangs it is given up, the rest go on anew."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from engine.bench.gpu_device.sections import Section

COMPILE_PATIENCE = 120.0  # seconds without a word while nothing runs: a start and a compile
MOST_STARTS = 6  # of workers for one section
# jax and torch share the device's memory, one worker after the other.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
WORKER = (sys.executable, "-m", "engine.bench.gpu_device.worker")

Task = dict[str, Any]
Told = Callable[[int, dict[str, Any]], None]


def run_tasks(
    section: Section,
    tasks: list[Task],
    told: Told,
    deadline: float,
    *,
    worker: tuple[str, ...] = WORKER,
    compile_patience: float = COMPILE_PATIENCE,
) -> None:
    """Runs a section's tasks; each ends in one call of ``told``.

    Args:
        section: whose tasks they are.
        tasks: to be run in order.
        told: called with a task's number and ``{"result": …}``, ``{"error": …}`` or ``{"skipped": …}``.
        deadline: of ``time.monotonic``: what has not begun by then is skipped, and what runs is given up.
        worker: the command of a worker, before the section's name.
        compile_patience: seconds that a worker may be silent while it runs nothing.
    """
    left = dict(enumerate(tasks))

    def done(number: int, outcome: dict[str, Any]) -> None:
        del left[number]
        told(number, outcome)

    for _ in range(MOST_STARTS):
        if not left or time.monotonic() >= deadline:
            break
        before = len(left)
        number, reason = _Worker(section, left, [*worker, section.name], compile_patience).serve(done, deadline)
        if number in left:
            done(number, {"error": reason})
        elif len(left) == before:  # it never came to a task: it will not the next time
            for number in list(left):
                done(number, {"error": reason})
    reason = "out of time" if time.monotonic() >= deadline else f"{MOST_STARTS} workers have died"
    for number in list(left):
        done(number, {"skipped": reason})


class _Worker:
    """One worker process with the tasks that are left."""

    def __init__(self, section: Section, left: dict[int, Task], command: list[str], compile_patience: float) -> None:
        self._patience = {True: section.patience, False: compile_patience}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT | os.environ
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._process.stdin is not None
        try:
            json.dump(list(left.items()), self._process.stdin)
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # its end is seen below

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def serve(self, done: Told, deadline: float) -> tuple[int, str]:
        """Passes results on until the worker is done, dead, silent for too long, or out of time.

        Returns:
            The task that was running, -1 if none was, and what ended it.
        """
        running = -1
        try:
            while True:
                patience = self._patience[running >= 0]
                wait = min(patience, deadline - time.monotonic())
                try:
                    line = self._lines.get(timeout=max(wait, 0.01))
                except queue.Empty:
                    return running, "out of time" if wait < patience else f"silent for {patience:.0f} s, given up"
                if line is None:
                    return running, f"the worker ended with code {self._process.wait()}"
                event = json.loads(line)
                if event.get("phase") == "running":
                    running = event["task"]
                elif "phase" not in event:
                    running = -1
                    done(event.pop("task"), event)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join(timeout=5)
