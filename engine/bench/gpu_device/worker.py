"""A process that runs the tasks of one section and reports each event as a line of JSON on stdout.

``python -m engine.bench.gpu_device.worker SECTION [--one-by-one]`` reads a JSON list of [number, task] from stdin. With
``--one-by-one`` it compiles one task at a time, so that a task which ends the process is identified. Lines are
``{"task": number, "phase": "compiling" | "compiled" | "running"}``, and last ``{"task": number, "result": {...}}`` or
``{"task": number, "error": "...", "trace": "..."}``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from engine.bench.gpu_device.sections import Section, section_named
from engine.errors import EngineError
from engine.terminal import keep_stdout_for_answers

MOST_COMPILERS = 8
DEVICE_FAILED = 3  # exit code
LONGEST_MESSAGE, LONGEST_TRACE = 500, 6000  # characters; a compiler's message may contain a whole program
Task = tuple[int, dict[str, Any]]
Runner = Callable[[], dict[str, Any]]

_telling = threading.Lock()


def main() -> None:
    """Runs the section named on the command line."""
    keep_stdout_for_answers()
    compilers = 1 if "--one-by-one" in sys.argv else min(MOST_COMPILERS, os.cpu_count() or 1)
    run_section(section_named(sys.argv[1]), [(number, task) for number, task in json.load(sys.stdin)], tell, compilers)


def tell(**event: Any) -> None:
    """Writes one line, whole and at once."""
    with _telling:
        print(json.dumps(event), flush=True)


def run_section(section: Section, tasks: list[Task], tell: Callable[..., None], compilers: int = 1) -> None:
    """Compiles tasks, ``compilers`` in parallel, and runs them one after the other; an exception is a task's result.

    Where a failure has broken the device for this process, the process ends: the other tasks need a new one.
    """
    with ThreadPoolExecutor(compilers) as pool:
        prepared = [(task, pool.submit(_prepare, section, task, tell)) for task in tasks]
        if section.compiles_ahead:  # a compile in parallel would disturb the timing
            for _, future in prepared:
                future.exception()
        for task, future in prepared:
            if not _run(section, task, future, tell):
                os._exit(DEVICE_FAILED)


def _prepare(section: Section, task: Task, tell: Callable[..., None]) -> tuple[Runner, float]:
    """The function that runs the task, and the seconds that its compile took."""
    tell(task=task[0], phase="compiling")
    start = time.perf_counter()
    try:
        runner = section.module.prepare(task[1])
    finally:
        tell(task=task[0], phase="compiled")
    return runner, time.perf_counter() - start


def _run(section: Section, task: Task, future: Future[tuple[Runner, float]], tell: Callable[..., None]) -> bool:
    """Whether the device is still usable for other tasks."""
    number, running = task[0], False
    try:
        if future.exception() and not isinstance(future.exception(), EngineError):
            runner, compile_s = _prepare(section, task, tell)  # once more, alone: some compiles fail only in parallel
        else:
            runner, compile_s = future.result()
        running = True
        tell(task=number, phase="running")
        start = time.perf_counter()
        result = runner()
        tell(task=number, result={**result, "compile_s": compile_s, "run_s": time.perf_counter() - start})
    except Exception as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST_MESSAGE]}"
        tell(task=number, error=message, trace=traceback.format_exc()[-LONGEST_TRACE:])
        return not running or _device_works()
    return True


def _device_works() -> bool:
    """Whether this process can still use the device: some failures break it permanently."""
    try:
        if "torch" in sys.modules:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
        else:
            import jax.numpy as jnp

            (jnp.ones(1) + 1).block_until_ready()
    except Exception:
        return False
    return True


if __name__ == "__main__":
    main()
