"""Remembers when each slot array was handed out, so that a stale one can be told from a live one.

A slot is an int32 with no room for a generation: after a page is freed and handed out again, the old holder's slots
equal the new holder's. The array object itself is the one thing that tells them apart, so the allocator's clock at
hand-out is kept beside a weak reference to it. A view counts as the array that it views; a copy is unknown.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# Before every page's birth: whatever is freed through a void array is stale.
VOID = -1


@dataclass
class _Handout:
    reference: weakref.ref[npt.NDArray[np.int32]]
    time: int
    serial: int
    is_void: bool = False


class Handouts:
    """Hand-out times of the arrays that are still alive somewhere."""

    def __init__(self) -> None:
        self._by_id: dict[int, _Handout] = {}
        self._recorded = 0

    def record(self, array: npt.NDArray[np.int32], time: int) -> None:
        """Remembers that ``array`` was handed out at ``time``."""
        key, by_id = id(array), self._by_id

        def forget(_: Any) -> None:
            by_id.pop(key, None)

        self._recorded += 1
        by_id[key] = _Handout(weakref.ref(array, forget), time, self._recorded)

    def time_of(self, array: object) -> int | None:
        """When ``array``, or the array that it is a view of, was handed out; ``VOID``, or None if not known."""
        while isinstance(array, np.ndarray):
            handout = self._by_id.get(id(array))
            if handout is not None and handout.reference() is array:
                return VOID if handout.is_void else handout.time
            array = array.base
        return None

    def void_serials(self) -> frozenset[int]:
        """Names the arrays that are void now, for ``rewind``."""
        return frozenset(handout.serial for handout in self._all() if handout.is_void)

    def rewind(self, time: int, void: frozenset[int]) -> None:
        """Returns to a moment: what was handed out after ``time``, or was ``void`` then, is void; the rest is not."""
        for handout in self._all():
            handout.is_void = handout.time > time or handout.serial in void

    def _all(self) -> list[_Handout]:
        # A copy: the garbage collector may find a dead array, and take its entry out, in the middle of a loop.
        return list(self._by_id.values())
