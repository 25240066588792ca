"""XLA's cache of compiled programs, on by default: a second start reads what the first one compiled.

jax's own settings come first: a directory that the user has set, by ``JAX_COMPILATION_CACHE_DIR`` or in ``jax.config``,
is left as it is, and ``JAX_ENABLE_COMPILATION_CACHE=false`` switches the cache off.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from engine.user_files import cache_directory, flaw_above, flaw_of

MIN_COMPILE_SECONDS = 0.1  # a program that compiles faster is not read faster from the cache

_logger = logging.getLogger(__name__)


def use_compile_cache() -> None:
    """Sets the directory of jax's cache for this process, where none is set; the engine starts without one, too."""
    settings: Any = jax.config  # its attributes exist at run time alone
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return
    try:
        directory = cache_directory() / "xla"
        _make_private(directory)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        _logger.warning("programs are compiled again at every start: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    compilation_cache.reset_cache()  # jax looks for the directory once, at the first program of the process
    _logger.info("compiled programs are kept in %s", directory)


def _make_private(directory: Path) -> None:
    """Makes a directory for its owner alone; raises OSError where others could write to it: programs read there run."""
    for place in (directory.parent, directory):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if flaw := flaw_of(place, folder=True) or flaw_above(place):
            raise PermissionError(f"{place} {flaw}; make it a folder that this user alone can write to")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(f"{directory} cannot be written to")
