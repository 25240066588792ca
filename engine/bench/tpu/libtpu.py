"""Where libtpu is, the compiler for TPUs.

``python -m engine.bench.tpu.libtpu`` installs the version that the installed jax pins, into a separate directory in the
environment. It is not installed like other packages: on a machine without a TPU jax would then look for one at every
start, which takes seconds and prints warnings. Only the processes that compile ahead of time can import it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from engine.errors import BackendUnsupported

SITE = Path(sys.prefix) / "libtpu"


def missing_compiler() -> str | None:
    """Why nothing can be compiled for a TPU here, or None where it can."""
    if not sys.platform.startswith("linux"):
        return f"libtpu compiles on Linux, not on {sys.platform}"
    if (SITE / "libtpu").is_dir() or importlib.util.find_spec("libtpu"):
        return None
    return "libtpu is not installed; run python -m engine.bench.tpu.libtpu"


def require_compiler() -> None:
    """Raises BackendUnsupported where nothing can be compiled for a TPU."""
    if reason := missing_compiler():
        raise BackendUnsupported(f"cannot compile for a TPU: {reason}")


def libtpu_version() -> str:
    """The version of the compiler, e.g. "0.0.50.1"; the compiled code differs between versions.

    Raises:
        BackendUnsupported: libtpu is not installed.
    """
    require_compiler()
    apart = list(importlib.metadata.distributions(name="libtpu", path=[str(SITE)]))
    return apart[0].version if apart else importlib.metadata.version("libtpu")


def pinned_requirement() -> str:
    """The libtpu that the installed jax is built for, as its extra ``tpu`` names it, e.g. "libtpu==0.0.50.*".

    Raises:
        BackendUnsupported: this jax names none.
    """
    for requirement in importlib.metadata.requires("jax") or []:
        if match := re.match(r"(libtpu[^;]*);.*extra == .tpu.", requirement):
            return match[1].strip()
    raise BackendUnsupported("the installed jax pins no libtpu; install one by hand")


def install() -> None:
    """Installs the pinned version into ``SITE`` unless one is installed.

    Raises:
        BackendUnsupported: it cannot be installed here.
    """
    if missing_compiler() is None:
        return
    if not sys.platform.startswith("linux"):
        require_compiler()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(SITE), pinned_requirement()], capture_output=True, text=True)
    if done.returncode:
        raise BackendUnsupported(f"cannot install {pinned_requirement()}:\n{done.stderr[-1000:]}")


if __name__ == "__main__":
    try:
        install()
        print(f"libtpu {libtpu_version()} compiles for TPUs here")
    except BackendUnsupported as error:
        sys.exit(f"{error}\ntests that compile ahead of time for a TPU are skipped")
