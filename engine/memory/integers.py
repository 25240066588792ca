"""Checks of integer arguments, shared by the allocator and the page table."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, ShapeError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

INT32_MAX = int(np.iinfo(np.int32).max)


def integer_vector(name: str, values: npt.ArrayLike) -> Int64:
    """Reads any integer array-like of one axis as int64.

    Raises:
        ShapeError: more or fewer axes than one, or not integers.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ShapeError(f"{name} is not a flat list of integers: {error}; pass a flat array or list") from error
    if array.ndim != 1:
        raise ShapeError(f"{name} has shape {array.shape}; it must have one axis; pass a flat array or list")
    if array.dtype.kind not in "iu" and array.size:
        raise ShapeError(f"{name} has dtype {array.dtype}; it must hold integers; convert it first")
    return array.astype(np.int64)


def equal_lengths(**arrays: Int64) -> None:
    """Checks that arguments that go together have one entry each per sequence.

    Raises:
        ShapeError: the lengths differ.
    """
    if len({array.size for array in arrays.values()}) > 1:
        lengths = ", ".join(f"{name} has {array.size}" for name, array in arrays.items())
        raise ShapeError(f"arguments of different lengths: {lengths}; each needs one entry per sequence")


def whole_count(what: str, value: int) -> int:
    """Reads how many of something are asked for.

    Raises:
        ShapeError: not an integer, or negative.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ShapeError(f"cannot {what}: the count is {value!r}; it must be an integer, 0 or more")
    return int(value)


def positive_option(name: str, value: int) -> int:
    """Reads a configuration value that counts something.

    Raises:
        ConfigError: not an integer, below 1, or beyond int32.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= INT32_MAX:
        raise ConfigError(f"{name} is {value!r}; it must be an integer from 1 to {INT32_MAX}")
    return int(value)


def ranges(starts: Int64, lengths: Int64) -> Int64:
    """Concatenates ``arange(start, start + length)`` of every pair; int64 ``[sum(lengths)]``."""
    ends = lengths.cumsum()
    total = int(ends[-1]) if ends.size else 0
    values: Int64 = np.arange(total, dtype=np.int64) + np.repeat(starts - ends + lengths, lengths)
    return values
