"""How programs are lowered before any of their arguments is there."""

from __future__ import annotations

from typing import Any

import jax


def lower(program: Any, *arguments: Any) -> Any:
    """Traces and lowers a jitted program in 32 bits whatever jax is set to, as TPU kernels need."""
    with jax.enable_x64(False):
        return program.lower(*arguments)


def placed(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, with a sharding, in place of the array."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
