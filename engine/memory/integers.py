"""Checks of integer arguments, shared by the allocator and the page table."""

from __future__ import annotations

from typing import TypeGuard

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, ShapeError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

INT32_MAX = int(np.iinfo(np.int32).max)
INT64_MAX = int(np.iinfo(np.int64).max)


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
    if array.dtype == np.uint64 and array.size and array.max() > INT64_MAX:
        raise ShapeError(f"{name} goes up to {array.max()}; it must fit in int64; a negative number has wrapped round")
    return array.astype(np.int64)


def integers_by_group(name: str, values: npt.ArrayLike, groups: int) -> Int64:
    """Reads integers of several groups, ``[groups, n]``, as int64; where there is one group, ``[n]`` will do.

    Raises:
        ShapeError: other axes, another number of groups, or not integers.
    """
    if groups == 1 and not (isinstance(values, np.ndarray) and values.ndim == 2):
        return integer_vector(name, values)[None]
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ShapeError(f"{name} has no shape: {error}; it must be [{groups} groups, n]") from error
    if array.ndim != 2 or len(array) != groups:
        raise ShapeError(f"{name} has shape {list(array.shape)}; it must be [{groups} groups, n]")
    return integer_vector(name, array.reshape(-1)).reshape(array.shape)


def read_only(array: Int32) -> Int32:
    """The array itself, made read-only."""
    array.flags.writeable = False
    return array


def equal_lengths(**arrays: Int64) -> None:
    """Checks that arguments that go together have one entry each per sequence.

    Raises:
        ShapeError: the lengths differ.
    """
    if len({array.size for array in arrays.values()}) > 1:
        lengths = ", ".join(f"{name} has {array.size}" for name, array in arrays.items())
        raise ShapeError(f"arguments of different lengths: {lengths}; each needs one entry per sequence")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is one integer, which no bool is."""
    return type(value) is int or isinstance(value, np.integer)


def whole_number(name: str, value: int, *, least: int = 0, most: int | None = None) -> int:
    """Reads an argument that is one integer.

    Raises:
        ShapeError: not an integer, below ``least`` or above ``most``.
    """
    if not is_integer(value) or value < least or (most is not None and value > most):
        limit = "or more" if most is None else f"to {most}"
        raise ShapeError(f"{name} is {value!r}; it must be an integer, {least} {limit}")
    return int(value)


def priority_level(priority: int) -> int:
    """Reads a priority; raises ShapeError where it is not an integer of 64 bits, e.g. NaN, which has no order."""
    if type(priority) is int and -INT64_MAX <= priority <= INT64_MAX:
        return priority
    return whole_number("priority", priority, least=-INT64_MAX - 1, most=INT64_MAX)


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
