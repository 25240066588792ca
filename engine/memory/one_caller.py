"""Checks that one set of books has one caller at a time, in the process that made it.

Nothing here waits: a program that calls from two threads needs a lock of its own; the calling thread may change between
calls. A mistake raises an error, and never leads to a page that two requests write.
"""

from __future__ import annotations

import os
import sys
import weakref
from threading import get_ident

from engine.errors import ConcurrentUse

_ROOM = os.path.dirname(__file__)


class OneCaller:
    """The thread that calls the objects of one set of books; each of these objects has it as ``caller``."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._thread: int | None = get_ident()
        _EVERYONE.add(self)

    def enter(self) -> None:
        """Begins a call that changes the books.

        Raises:
            ConcurrentUse: another thread is in such a call, or this process is a fork of the one that made the books.
        """
        if get_ident() != self._thread:
            self._take_over()

    def forget_thread(self) -> None:
        """Makes the next call check its process and thread."""
        self._thread = None

    def _take_over(self) -> None:
        if os.getpid() != self._process:
            raise ConcurrentUse(
                f"these books were made by process {self._process} and this is its fork {os.getpid()}: both would "
                "allocate the same pages; make new ones in each process"
            )
        # Enters before it looks at the other thread: of two that call at once, at least one sees the other.
        before, self._thread = self._thread, get_ident()
        if before is not None and self._is_inside(before):
            self._thread = before
            raise ConcurrentUse(
                f"thread {get_ident()} cannot change books that thread {before} is changing now; nothing was "
                "changed; let threads take turns by a lock around each call"
            )

    def _is_inside(self, thread: int) -> bool:
        """Whether another thread is in a call; read from its stack, so that no fault can leave a stale mark."""
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
