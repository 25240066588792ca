"""Where jax's compiler for NVIDIA GPUs is.

``python -m engine.bench.gpu.toolchain`` installs what ahead-of-time compiles need, for the installed jax's version:
jax's CUDA plugin with its PJRT, and NVIDIA's disassembler, 150 MB to download and 420 MB on disk, into a separate
directory in the environment. If jax found them there it would look for a GPU at every start, so only the processes that
compile ahead of time can import them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax

from engine.errors import BackendUnsupported
from engine.kv.gpu_target import OLDEST_JAX

SITE = Path(sys.prefix) / "gpu-compiler"
REQUIREMENTS = ("jax-cuda13-plugin=={0}", "jax-cuda13-pjrt=={0}", "nvidia-cuda-nvdisasm")


def missing_compiler() -> str | None:
    """Why nothing can be compiled for a GPU here, or None where it can."""
    if not sys.platform.startswith("linux"):
        return f"jax's CUDA plugin runs on Linux, not on {sys.platform}"
    if jax.__version_info__ < OLDEST_JAX:
        return f"jax {jax.__version__} is older than {'.'.join(map(str, OLDEST_JAX))}, which needs Python 3.12"
    if not (SITE / "jax_cuda13_plugin").is_dir():
        return "jax's CUDA plugin is not installed; run python -m engine.bench.gpu.toolchain"
    return None


def require_compiler() -> None:
    """Raises BackendUnsupported where nothing can be compiled for a GPU."""
    if reason := missing_compiler():
        raise BackendUnsupported(f"cannot compile for a GPU: {reason}")


def install() -> None:
    """Installs the compiler for the installed jax's version into ``SITE`` unless one is installed.

    Raises:
        BackendUnsupported: it cannot be installed here.
    """
    if missing_compiler() is None:
        return
    if not sys.platform.startswith("linux") or jax.__version_info__ < OLDEST_JAX:
        require_compiler()
    version = jax.__version__.split(".dev")[0]
    wanted = [requirement.format(version) for requirement in REQUIREMENTS]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(SITE), *wanted], capture_output=True, text=True)
    if done.returncode:
        raise BackendUnsupported(f"cannot install {', '.join(wanted)}:\n{done.stderr[-1000:]}")


if __name__ == "__main__":
    try:
        install()
        require_compiler()
        print(f"jax {jax.__version__} compiles for GPUs here")
    except BackendUnsupported as error:
        sys.exit(f"{error}\ntests that compile ahead of time for a GPU are skipped")
