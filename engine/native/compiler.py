"""Builds the native library once per machine and user, with any C++17 compiler.

The interface to XLA is a set of headers that jaxlib ships, so nothing is linked and nothing else is needed.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
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
from engine.user_files import cache_directory, flaw_above, flaw_of

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cc")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-Wall", "-Wextra", "-shared", "-fPIC")
SEARCH_PATHS = ("CPATH", "CPLUS_INCLUDE_PATH", "COMPILER_PATH")  # environment variables that compilers read
TIMEOUT_SECONDS = 300

_logger = logging.getLogger(__name__)


def build_library() -> Path:
    """Compiles the native library where it is not compiled yet.

    Several processes may build at once: each compiles a file of its own and moves it into place. A file that another
    user could have written is built anew; where another user could have written the directory, the library is built in
    a directory that ends with this process.

    Returns:
        The shared library, in the user's cache directory, named by a hash of everything that it was made from.

    Raises:
        BackendUnsupported: there is no C++ compiler, or it fails; the message ends with the compiler's output.
    """
    compiler = find_compiler()
    try:
        directory = cache_directory()
    except RuntimeError as error:
        raise BackendUnsupported(f"no place for the native library: {error}; set XDG_CACHE_HOME") from error
    target = directory / f"libengine-{_fingerprint(compiler)}.so"
    try:
        if not os.path.lexists(directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if flaw := flaw_of(directory, folder=True) or flaw_above(directory):
            target = _own_directory(f"{directory} {flaw}") / target.name
        if os.path.lexists(target):
            flaw = flaw_of(target)
            if flaw is None:
                return target
            _logger.warning("the native library %s %s: it is built anew", target, flaw)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            fresh = Path(scratch) / target.name
            _compile(compiler, fresh)
            fresh.chmod(0o700)  # whatever the umask
            os.replace(fresh, target)
    except OSError as error:
        raise BackendUnsupported(
            f"cannot write the native library {target}: {error.strerror}; point XDG_CACHE_HOME to a writable directory"
        ) from error
    return target


@functools.cache
def _own_directory(reason: str) -> Path:
    """A directory that ends with this process and that no other user can write to; logs once why it is needed."""
    _logger.warning("the native library is built for this process alone, since %s; make it yours, mode 0700", reason)
    directory = tempfile.mkdtemp(prefix="engine-native-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def find_compiler() -> tuple[str, ...]:
    """The command that compiles C++: ``$CXX`` where it is set, else the first of ``COMPILERS`` on the path.

    Raises:
        BackendUnsupported: there is no compiler, or ``$CXX`` is not a command.
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
    """A hash of everything that goes into a build, so that a change of any of it builds anew."""
    digest = hashlib.sha256()
    # The compiler's file, not only its name: it may be replaced in place.
    program = Path(shutil.which(compiler[0]) or compiler[0])
    made = [str(n) for n in (program.stat().st_size, program.stat().st_mtime_ns)] if program.exists() else []
    machine = (platform.system(), platform.machine(), _processor())
    inputs = (
        *compiler,
        *made,
        *FLAGS,
        *(f"{name}={os.environ.get(name)}" for name in SEARCH_PATHS),
        version("jaxlib"),
        *machine,
    )
    for part in inputs:
        digest.update(part.encode() + b"\0")
    for source in (*SOURCES, *HEADERS, *sorted(Path(jax.ffi.include_dir()).rglob("*.h"))):
        content = source.read_bytes()
        digest.update(f"{source.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:20]


def _processor() -> str:
    """The processor that the code is compiled for: machines with different processors may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
