"""Remembers the arrays that were handed out: when, and whether they hold slots or pages.

A slot is an int32 with no room for a generation: after a page is freed and handed out again, the old holder's slots
equal the new holder's, and some slots equal page ids. The array object itself is the one thing that tells them apart,
so the pool's clock at hand-out is kept beside a weak reference to it. A view counts as the array that it views; a copy
is unknown.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

# Before every page's birth: whatever is freed through a void array is stale.
VOID = -1


class Handout(weakref.ref[npt.NDArray[np.int32]]):
    """A weak reference to one array that was handed out.

    Attributes:
        key: identity of the array.
        time: the pool's clock at hand-out.
        serial: number of arrays recorded before it.
        are_slots: whether the array holds slots; else it holds page ids.
        is_void: whether a snapshot from before was restored since.
    """

    __slots__ = ("are_slots", "is_void", "key", "serial", "time")
    key: int
    time: int
    serial: int
    are_slots: bool
    is_void: bool

    @property
    def known_since(self) -> int:
        """The clock at hand-out, or ``VOID``."""
        return VOID if self.is_void else self.time


class Handouts:
    """The arrays that were handed out and are still alive somewhere."""

    def __init__(self) -> None:
        by_id: dict[int, Handout] = {}

        def forget(dead: Any) -> None:
            by_id.pop(dead.key, None)

        self._by_id, self._forget = by_id, forget
        self._recorded = 0

    def record(self, array: npt.NDArray[np.int32], time: int, *, are_slots: bool) -> None:
        """Remembers that ``array``, of slots or of page ids, was handed out at ``time``."""
        handout = Handout(array, self._forget)
        self._recorded += 1
        handout.key, handout.time, handout.serial = id(array), time, self._recorded
        handout.are_slots, handout.is_void = are_slots, False
        self._by_id[handout.key] = handout

    def find(self, array: object) -> Handout | None:
        """The record of ``array``, or of the array that it is a view of; None if it is not known."""
        while isinstance(array, np.ndarray):
            handout = self._by_id.get(id(array))
            if handout is not None and handout() is array:
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
