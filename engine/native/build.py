"""Building the native library once per machine and user, with whatever C++17 compiler there is.

The interface to XLA is a set of headers that jaxlib ships, so that nothing is linked and nothing else is needed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax

from engine.errors import BackendUnsupported

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cc")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-Wall", "-Wextra", "-shared", "-fPIC")
TIMEOUT_SECONDS = 300


def build_library() -> Path:
    """Compiles the native library where it is not compiled yet.

    Safe when several processes build at once: each compiles a file of its own and moves it into place.

    Returns:
        The shared library, in a cache directory of the user (``$XDG_CACHE_HOME`` or ``~/.cache``), named by a hash of
        all that it was made from.

    Raises:
        BackendUnsupported: there is no C++ compiler, or it fails; the message has its last words.
    """
    compiler = find_compiler()
    target = _cache_directory() / f"libengine-{_fingerprint(compiler)}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            fresh = Path(scratch) / target.name
            _compile(compiler, fresh)
            os.replace(fresh, target)
    except OSError as error:
        raise BackendUnsupported(
            f"cannot write the native library {target}: {error.strerror}; point XDG_CACHE_HOME to a writable directory"
        ) from error
    return target


def find_compiler() -> tuple[str, ...]:
    """The command that compiles C++: ``$CXX`` where it is set, else the first of ``COMPILERS`` on the path.

    Raises:
        BackendUnsupported: there is none.
    """
    chosen = os.environ.get("CXX", "")
    if chosen.strip():
        try:
            return tuple(shlex.split(chosen))
        except ValueError as error:
            raise BackendUnsupported(f"CXX={chosen!r} is not a command: {error}; unset it or correct it") from error
    for name in COMPILERS:
        found = shutil.which(name)
        if found:
            return (found,)
    raise BackendUnsupported(
        f"no C++ compiler: looked for $CXX and for {', '.join(COMPILERS)} on the path; install one (e.g. g++ or clang)"
    )


def _compile(compiler: tuple[str, ...], output: Path) -> None:
    command = [*compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), *map(str, SOURCES), "-o", str(output)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendUnsupported(
            f"the C++ compiler {compiler[0]!r} did not run: {error}; set CXX to one that does"
        ) from error
    if result.returncode:
        raise BackendUnsupported(
            f"the C++ compiler {compiler[0]!r} failed with status {result.returncode}: "
            f"{result.stderr.strip()[-2000:]}; set CXX to a compiler for C++17"
        )


def _fingerprint(compiler: tuple[str, ...]) -> str:
    """Names a build by its inputs, so that a change of any of them builds anew."""
    digest = hashlib.sha256()
    inputs = (*compiler, *FLAGS, version("jaxlib"), platform.system(), platform.machine(), _processor())
    for part in inputs:
        digest.update(part.encode() + b"\0")
    for source in (*SOURCES, *HEADERS):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """What the code is compiled for: a home directory may be shared by machines with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fused-kv-engine"
    except RuntimeError as error:
        raise BackendUnsupported(f"no place for the native library: {error}; set XDG_CACHE_HOME") from error
