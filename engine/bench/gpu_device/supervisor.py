"""Runs tasks in worker processes: a task that kills or hangs a worker is given up, and the others continue."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engine.bench.compiling import pipes_of
from engine.bench.gpu_device.sections import Section

COMPILE_PATIENCE = 120.0  # seconds without output while no task runs: start and compile
NONE = -1  # no task
MOST_STARTS = 6  # starts of one worker and its successors
# jax and torch workers run one after the other and share the device's memory.
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
    """Runs a section's tasks; each ends in one call of ``told``, and one such call at a time.

    Args:
        section: the section of the tasks, which are dealt to its workers in turn.
        tasks: the tasks to run; each worker runs its tasks in order.
        told: called with a task's number and ``{"result": …}``, ``{"error": …}`` or ``{"skipped": …}``.
        deadline: value of ``time.monotonic`` at which tasks not yet begun are skipped and the running one is given up.
        worker: the command of a worker, before the section's name.
        compile_patience: seconds that a worker may be silent while it runs no task.
    """
    telling, stopped = threading.Lock(), threading.Event()

    def tell(number: int, outcome: dict[str, Any]) -> None:
        with telling:
            told(number, outcome)

    every = list(enumerate(tasks))
    with ThreadPoolExecutor(section.workers) as pool:
        shares = [dict(every[first :: section.workers]) for first in range(section.workers)]
        command = [*worker, section.name]
        running = [
            pool.submit(_run, section, left, tell, deadline, command, compile_patience, stopped) for left in shares
        ]
        try:
            for future in running:
                future.result()
        finally:  # Ctrl-C ends the workers too, and no successor may start
            stopped.set()


def _run(
    section: Section,
    left: dict[int, Task],
    told: Told,
    deadline: float,
    command: list[str],
    compile_patience: float,
    stopped: threading.Event,
) -> None:
    """Runs the tasks of one worker, by it and its successors."""

    def done(number: int, outcome: dict[str, Any]) -> None:
        del left[number]
        told(number, outcome)

    side_by_side = True
    for _ in range(MOST_STARTS):
        if not left or stopped.is_set() or time.monotonic() >= deadline:
            break
        before = len(left)
        options = [] if side_by_side else ["--one-by-one"]
        number, reason = _Worker(section, left, [*command, *options], compile_patience).serve(done, deadline)
        if number in left:
            done(number, {"error": reason})
        elif len(left) == before and side_by_side:  # one of several compiles failed: the next worker finds out which
            side_by_side = False
        elif len(left) == before:  # it did not reach a task, and its successor would not either
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
        stdin, self._stdout = pipes_of(self._process)
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            json.dump(list(left.items()), stdin)
            stdin.close()
        except BrokenPipeError:
            pass  # the end of its output is handled below

    def _read(self) -> None:
        with self._stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def serve(self, done: Told, deadline: float) -> tuple[int, str]:
        """Passes results on until the worker ends, dies, is silent for too long, or runs out of time.

        Returns:
            The task that was running, or the only one in compilation, or -1 if there is none; and the reason.
        """
        running, compiling = NONE, set[int]()
        try:
            while True:
                patience = self._patience[running != NONE]
                wait = min(patience, deadline - time.monotonic())
                try:
                    line = self._lines.get(timeout=max(wait, 0.01))
                except queue.Empty:
                    reason = "out of time" if wait < patience else f"silent for {patience:.0f} s, given up"
                    break
                if line is None:
                    reason = f"the worker ended with code {self._process.wait()}"
                    break
                event = json.loads(line)
                phase, number = event.get("phase"), event["task"]
                if phase is None:
                    running = NONE
                    done(event.pop("task"), event)
                elif phase == "running":
                    running = number
                (compiling.add if phase == "compiling" else compiling.discard)(number)
            if running == NONE and len(compiling) == 1:
                (running,) = compiling
            return running, reason
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join(timeout=5)
