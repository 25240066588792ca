"""Compiles ahead of time in a separate process, whose environment is the one that the target needs.

``python -m engine.bench.compiling MODULE:FUNCTION`` is that process: it reads a JSON list of keyword arguments, calls
the function with each of them, and prints one line of JSON after each call.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from engine.errors import BackendUnsupported

MARK = "aot-result "


def compile_cases(
    target: str, cases: Sequence[dict[str, Any]], *, site: Path, environment: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Calls ``target`` once per case, all in one separate process, and yields each result when it arrives.

    Args:
        target: "module:function"; takes keyword arguments and returns a dict, both of JSON's types.
        cases: the keyword arguments of each call.
        site: directory with the compiler's packages, searched before all others.
        environment: variables that must be set before jax is imported.

    Yields:
        The function's dict, or ``{"failed": message}`` where it raised.

    Raises:
        BackendUnsupported: the process died.
    """
    with tempfile.TemporaryFile("w+") as errors:
        path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "engine.bench.compiling", target]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, env=os.environ | environment | {"PYTHONPATH": path}, **pipes) as process:
            try:
                yield from _converse(process, cases)
            finally:
                process.kill()
        if process.returncode not in (0, -9):
            errors.seek(0)
            raise BackendUnsupported(f"the compiler of {target} died:\n{errors.read()[-2000:]}")


def _converse(process: subprocess.Popen[str], cases: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    stdin, stdout = pipes_of(process)
    json.dump(list(cases), stdin)
    stdin.close()
    for line in stdout:
        if line.startswith(MARK):
            yield json.loads(line.removeprefix(MARK))
    process.wait()


def pipes_of(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    """The pipes to a process and from it; raises BackendUnsupported where it has none."""
    if process.stdin is None or process.stdout is None:
        raise BackendUnsupported("a process that was started for the benchmark has no pipes")
    return process.stdin, process.stdout


def main() -> None:
    """Runs the process that the module's docstring describes."""
    module, name = sys.argv[1].split(":")
    function = getattr(importlib.import_module(module), name)
    for case in json.load(sys.stdin):
        try:
            result = function(**case)
        except Exception as error:  # any failure of one compile is that case's result; the others still run
            result = {"failed": f"{type(error).__name__}: {error}"}
        print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
