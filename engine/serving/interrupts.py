"""Holds Ctrl-C back, so that it is raised between two changes of the engine and never within one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class HeldInterrupts:
    """A context in which Ctrl-C is held back, since Python may raise it between any two instructions.

    Raised after a program has consumed the pool's buffers and before its results have a name, it would leave no pool.
    Python runs signal handlers in the main thread, so in other threads there is nothing to hold back. A second Ctrl-C
    is not held back, in case the context never ends.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._handler: Callable[[int, FrameType | None], Any] | None = None  # the one to restore
        self._held: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> None:
        """Holds Ctrl-C back; may be nested."""
        if threading.current_thread() is not threading.main_thread():
            return
        if not self._depth:
            handler = signal.getsignal(signal.SIGINT)
            self._handler = handler if callable(handler) else None
            if self._handler is not None:
                signal.signal(signal.SIGINT, self._hold)
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        """Ends the outermost context and raises a Ctrl-C that was held back."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._depth -= 1
        if not self._depth and self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._let_in()

    def _let_in(self) -> None:
        """Passes the signal that was held back to its handler, which usually raises KeyboardInterrupt."""
        held, self._held = self._held, None
        if held is not None and self._handler is not None:
            self._handler(*held)

    def _hold(self, signum: int, frame: FrameType | None) -> None:
        if self._held is not None:
            self._let_in()
        self._held = signum, frame
