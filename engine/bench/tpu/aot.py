"""Runs compiles for a TPU in a process of their own, on a machine that has libtpu and no TPU.

``python -m engine.bench.tpu.aot MODULE:FUNCTION`` is that process: it reads a JSON list of keyword arguments, calls the
function with each, and prints a JSON line after each.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from engine.bench.tpu.libtpu import SITE, require_compiler
from engine.errors import BackendUnsupported

# The smallest topology of each generation; kernels are compiled for its first device.
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
# What libtpu must find before jax is imported, to compile where no TPU is.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}
# Without the last of these a dump is hundreds of megabytes.
DUMP_FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final.*"
)
MARK = "aot-result "


def compile_each(target: str, cases: Sequence[dict[str, Any]], *, dump: bool = False) -> Iterator[dict[str, Any]]:
    """Calls ``target`` once a case in one process of its own, and yields what it returns as it comes.

    Args:
        target: "module:function"; takes keyword arguments and returns a dict, both of JSON's types.
        cases: the keyword arguments.
        dump: pass each call ``folder=``, where libtpu leaves the bundles of what is compiled.

    Yields:
        The function's dict, or ``{"failed": message}`` where it raised.

    Raises:
        BackendUnsupported: there is no libtpu here, or the process died.
    """
    require_compiler()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        # The compiler of this environment first, then whatever the caller's path has.
        path = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": path}
        if dump:
            environment["LIBTPU_INIT_ARGS"] = DUMP_FLAGS.format(folder)
            cases = [{**case, "folder": folder} for case in cases]
        command = [sys.executable, "-m", "engine.bench.tpu.aot", target]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as process:
            try:
                yield from _converse(process, cases)
            finally:
                process.kill()
        if process.returncode not in (0, -9):
            errors.seek(0)
            raise BackendUnsupported(f"the compiler of {target} died:\n{errors.read()[-2000:]}")


def _converse(process: subprocess.Popen[str], cases: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    stdin, stdout = _pipes(process)
    json.dump(list(cases), stdin)
    stdin.close()
    for line in stdout:
        if line.startswith(MARK):
            yield json.loads(line.removeprefix(MARK))
    process.wait()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if process.stdin is None or process.stdout is None:
        raise BackendUnsupported("the compiler's process has no pipes")
    return process.stdin, process.stdout


def fresh_dumps(folder: Path, pattern: str, seen: set[Path]) -> list[Path]:
    """Final bundles of the programs dumped since the last call whose names match ``pattern``; ``seen`` grows."""
    found = {f for f in folder.glob("*final_bundles.txt") if "schedule" not in f.name} - seen
    seen |= found
    return sorted(f for f in found if pattern in f.name)


def main() -> None:
    """Does what the module says."""
    module, name = sys.argv[1].split(":")
    function = getattr(importlib.import_module(module), name)
    for case in json.load(sys.stdin):
        try:
            result = function(**case)
        except Exception as error:  # any failure of one compile is that case's answer; the others still run
            result = {"failed": f"{type(error).__name__}: {error}"}
        print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
