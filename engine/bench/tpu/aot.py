"""Compiles for a TPU in a separate process, on a machine that has libtpu and no TPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.bench.compiling import compile_cases
from engine.bench.tpu.libtpu import SITE, require_compiler

# The smallest topology of each generation; kernels are compiled for its first device.
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
# Environment that libtpu needs before jax is imported, to compile where no TPU is.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}
# Without the last of these flags a dump is hundreds of megabytes.
DUMP_FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final.*"
)


def compile_each(target: str, cases: Sequence[dict[str, Any]], *, dump: bool = False) -> Iterator[dict[str, Any]]:
    """Calls ``target`` once per case, all in one separate process, and yields each result when it arrives.

    Args:
        target: "module:function"; takes keyword arguments and returns a dict, both of JSON's types.
        cases: the keyword arguments of each call.
        dump: whether each call gets ``folder=``, the directory where libtpu writes the bundles of compiled programs.

    Yields:
        The function's dict, or ``{"failed": message}`` where it raised.

    Raises:
        BackendUnsupported: there is no libtpu here, or the process died.
    """
    require_compiler()
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(ENVIRONMENT)
        if dump:
            environment["LIBTPU_INIT_ARGS"] = DUMP_FLAGS.format(folder)
            cases = [{**case, "folder": folder} for case in cases]
        yield from compile_cases(target, cases, site=SITE, environment=environment)


def fresh_dumps(folder: Path, pattern: str, seen: set[Path]) -> list[Path]:
    """Final bundles of the programs dumped since the last call whose names match ``pattern``; ``seen`` grows."""
    found = {f for f in folder.glob("*final_bundles.txt") if "schedule" not in f.name} - seen
    seen |= found
    return sorted(f for f in found if pattern in f.name)
