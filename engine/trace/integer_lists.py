"""Lists of integers in a trace: short ones as they are, long ones as the base64 of int32, least significant first."""

from __future__ import annotations

from base64 import b64decode, b64encode

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError
from engine.memory.integers import Int32

LONGEST_LIST = 16


def pack(values: npt.ArrayLike) -> list[int] | str:
    """Integers within int32 as a trace has them."""
    array = np.atleast_1d(np.asarray(values))
    if array.size <= LONGEST_LIST:
        return [int(value) for value in array.tolist()]
    return b64encode(array.astype("<i4").tobytes()).decode()


def unpack(written: object) -> Int32:
    """Reads what ``pack`` wrote; raises ConfigError where it did not."""
    try:
        if isinstance(written, str):
            return np.frombuffer(b64decode(written, validate=True), "<i4").astype(np.int32)
        if isinstance(written, list) and all(type(value) is int for value in written):
            return np.array(written, np.int32)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{written!r:.60} in a trace are no integers: {error}") from error
    raise ConfigError(f"{written!r:.60} in a trace are no integers")
