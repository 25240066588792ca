"""Remembers the arrays that were handed out: when, and whether they hold slots or pages.

A slot is an int32 with no room for a generation: after a page is freed and handed out again, the old holder's slots
equal the new holder's, and some slots equal page ids. The array object itself is the one thing that tells them apart,
so the pool's clock at hand-out is kept beside a weak reference to it. A view counts as the array that it views; a copy
is unknown.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# Before every page's birth: whatever is freed through a void array is stale.
VOID = -1


@dataclass(slots=True)
class Handout:
    """One array that was handed out.

    Attributes:
        reference: weak reference to the array.
        time: the pool's clock at hand-out.
        serial: number of arrays recorded before it.
        are_slots: whether the array holds slots; else it holds page ids.
        is_void: whether a snapshot from before was restored since.
    """

    reference: weakref.ref[npt.NDArray[np.int32]]
    time: int
    serial: int
    are_slots: bool
    is_void: bool = False

    @property
    def known_since(self) -> int:
        """The clock at hand-out, or ``VOID``."""
        return VOID if self.is_void else self.time


class Handouts:
    """The arrays that were handed out and are still alive somewhere."""

    def __init__(self) -> None:
        self._by_id: dict[int, Handout] = {}
        self._recorded = 0

    def record(self, array: npt.NDArray[np.int32], time: int, *, are_slots: bool) -> None:
        """Remembers that ``array``, of slots or of page ids, was handed out at ``time``."""
        key, by_id = id(array), self._by_id

        def forget(_: Any) -> None:
            by_id.pop(key, None)

        self._recorded += 1
        by_id[key] = Handout(weakref.ref(array, forget), time, self._recorded, are_slots)

    def find(self, array: object) -> Handout | None:
        """The record of ``array``, or of the array that it is a view of; None if it is not known."""
        while isinstance(array, np.ndarray):
            handout = self._by_id.get(id(array))
            if handout is not None and handout.reference() is array:
                return handout
            array = array.base
        return None

    def void_serials(self) -> frozenset[int]:
        """Names the arrays that are void now, for ``rewind``."""
        return frozenset(handout.serial for handout in self._all() if handout.is_void)

    def rewind(self, time: int, void: frozenset[int]) -> None:
        """Returns to a moment: what was handed out after ``time``, or was ``void`` then, is void; the rest is not."""
        for handout in self._all():
            handout.is_void = handout.time > time or handout.serial in void

    def _all(self) -> list[Handout]:
        # A copy: the garbage collector may find a dead array, and take its entry out, in the middle of a loop.
        return list(self._by_id.values())
