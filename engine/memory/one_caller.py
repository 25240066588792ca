"""Books are for one caller at a time, and for the process that made them.

Nothing here waits: whoever calls from two threads takes turns by a lock of their own, and may hand the books from
thread to thread between calls. What a mistake costs is a refusal, not a page that two requests write.
"""

from __future__ import annotations

import os
import sys
import weakref
from threading import get_ident

from engine.errors import ConcurrentUse

_ROOM = os.path.dirname(__file__)


class OneCaller:
    """Who calls the objects that keep one set of books; each of them has it as ``caller``."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._thread: int | None = get_ident()
        _EVERYONE.add(self)

    def enter(self) -> None:
        """Begins a call that changes the books.

        Raises:
            ConcurrentUse: another thread is inside of one, or this is a fork of the process that made the books.
        """
        if get_ident() != self._thread:
            self._take_over()

    def forget_thread(self) -> None:
        """Makes the next caller prove itself."""
        self._thread = None

    def _take_over(self) -> None:
        if os.getpid() != self._process:
            raise ConcurrentUse(
                f"these books were made by process {self._process} and this is its fork {os.getpid()}: both would hand "
                "out the same pages; make them anew in each process"
            )
        # Entered before the other is looked at: of two that come at once, one at least sees the other.
        before, self._thread = self._thread, get_ident()
        if before is not None and self._is_inside(before):
            self._thread = before
            raise ConcurrentUse(
                f"thread {get_ident()} cannot change books that thread {before} is changing just now; nothing was "
                "changed; let threads take turns by a lock around each call"
            )

    def _is_inside(self, thread: int) -> bool:
        """Whether another thread is in a call; its stack says so, so that no fault can leave a mark behind."""
        frame = sys._current_frames().get(thread)
        while frame is not None:
            is_ours = frame.f_code.co_filename.startswith(_ROOM)
            if is_ours and getattr(frame.f_locals.get("self"), "caller", None) is self:
                return True
            frame = frame.f_back
        return False


_EVERYONE: weakref.WeakSet[OneCaller] = weakref.WeakSet()


def _after_fork() -> None:
    for caller in _EVERYONE:
        caller.forget_thread()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
