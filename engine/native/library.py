"""Loads the native library and registers its kernels with XLA."""

from __future__ import annotations

import ctypes
import functools
import logging

import jax

from engine.errors import BackendUnsupported
from engine.native.compiler import build_library

SCATTER = "engine_kv_scatter"
QUANTISE = "engine_kv_quantise"
ATTENTION = "engine_attention"
TARGETS = (SCATTER, QUANTISE, ATTENTION)

_logger = logging.getLogger(__name__)


@functools.cache
def available() -> bool:
    """Whether the native kernels can be called on the CPU; the first call builds, loads and registers them.

    Where they cannot, one warning gives the reason, and plain XLA does the work.
    """
    try:
        register()
    except BackendUnsupported as error:
        _logger.warning(
            "native CPU kernels are off: attention runs on XLA at less than half the speed, and a write to a bfloat16 "
            "or 8-bit cache may convert the whole layer's buffer there and back, about 1 ms per MB (docs/adr/0001; not "
            "for bfloat16 from jax 0.12 on): %s",
            error,
        )
        return False
    return True


def register() -> None:
    """Builds and loads the library and registers each of ``TARGETS`` for the CPU.

    Raises:
        BackendUnsupported: the library cannot be built or loaded.
    """
    path = build_library()
    try:
        library = ctypes.CDLL(str(path))
        handlers = {name: jax.ffi.pycapsule(getattr(library, name)) for name in TARGETS}
    except (OSError, AttributeError) as error:
        raise BackendUnsupported(
            f"cannot load the native library {path}: {error}; delete it to build it anew"
        ) from error
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
