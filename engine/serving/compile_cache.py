"""XLA's cache of compiled programs, on by default: a second start reads what the first one compiled.

jax's own settings come first: a directory that the user has set, by ``JAX_COMPILATION_CACHE_DIR`` or in ``jax.config``,
is left as it is, and ``JAX_ENABLE_COMPILATION_CACHE=false`` switches the cache off.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

CACHE_DIRECTORY = Path("fused-kv-engine", "xla")  # in the user's cache directory
MIN_COMPILE_SECONDS = 0.1  # what compiles faster is as fast to compile as to read

_logger = logging.getLogger(__name__)


def use_compile_cache() -> None:
    """Sets the directory of jax's cache for this process, where none is set; without one the engine starts as well."""
    settings: Any = jax.config  # whose names exist at run time alone
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return
    try:
        directory = _private_directory(_user_cache())
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        _logger.warning("programs are compiled anew at every start: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    compilation_cache.reset_cache()  # jax looks for the directory once, at the first program of the process
    _logger.info("compiled programs are kept in %s", directory)


def _user_cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / CACHE_DIRECTORY


def _private_directory(path: Path) -> Path:
    """Makes ``path``, for its owner alone; raises OSError where others could write to it: programs read there run."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    for place in (path.parent, path):
        found = place.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(f"{place} is not a directory that this user alone can write to; remove it")
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written to")
    return path
