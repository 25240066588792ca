"""Copies of a whole world, as bytes; a world is restored from them once per move.

What never changes is not copied, and all worlds share two things that say nothing of their state:

    Handouts   which arrays of slots and pages are alive somewhere, to refuse a mix-up of the two
    OneCaller  which thread called last
"""

from __future__ import annotations

import copyreg
import io
import pickle
from typing import Any

import numpy as np

from engine.memory.offload.page_format import PageFormat
from engine.memory.one_caller import OneCaller
from engine.memory.pages.handouts import Handouts
from engine.memory.scope import CacheScope
from engine.planning.page_demand import PageDemand

_constants: list[Any] = []


def _constant(place: int) -> Any:
    return _constants[place]


def _by_place(value: Any) -> tuple[Any, tuple[int]]:
    for place, each in enumerate(_constants):
        if each is value:
            return _constant, (place,)
    _constants.append(value)
    return _constant, (len(_constants) - 1,)


def _array(array: np.ndarray[Any, Any]) -> Any:
    # One call to make it again: what NumPy does itself takes three times as long.
    if array.dtype.hasobject:
        return array.__reduce__()
    return np.ndarray, (array.shape, array.dtype, bytearray(array.tobytes()))


_reductions = copyreg.dispatch_table.copy()
_reductions[np.ndarray] = _array


def keep_as_they_are(*kinds: type) -> None:
    """Objects of these types are not copied: every world has the same."""
    for kind in kinds:
        _reductions[kind] = _by_place


keep_as_they_are(CacheScope, PageFormat, PageDemand, Handouts, OneCaller)


def saved(world: Any) -> bytes:
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = _reductions
    pickler.dump(world)
    return buffer.getvalue()


def restored(snapshot: bytes) -> Any:
    return pickle.loads(snapshot)
