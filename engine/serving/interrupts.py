"""Ctrl-C comes between two changes of the engine, never in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class HeldInterrupts:
    """Holds Ctrl-C back while it is entered, since Python would raise it between any two instructions.

    One of those is between a program that has taken the pool's buffers and the name that its results get: raised
    there, it leaves no pool. Python runs signal handlers in the main thread, so elsewhere there is nothing to hold.
    A second Ctrl-C is not held, in case the first waits for what never ends.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._handler: Callable[[int, FrameType | None], Any] | None = None  # whose turn it is afterwards
        self._held: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> None:
        """Begins what must not be interrupted, perhaps within something else that must not be."""
        if threading.current_thread() is not threading.main_thread():
            return
        if not self._depth:
            handler = signal.getsignal(signal.SIGINT)
            self._handler = handler if callable(handler) else None
            if self._handler is not None:
                signal.signal(signal.SIGINT, self._hold)
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        """Ends it; what was held back comes now."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._depth -= 1
        if not self._depth and self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._let_in()

    def _let_in(self) -> None:
        """Lets the one that is held back do what it would have done, raise KeyboardInterrupt as a rule."""
        held, self._held = self._held, None
        if held is not None and self._handler is not None:
            self._handler(*held)

    def _hold(self, signum: int, frame: FrameType | None) -> None:
        if self._held is not None:
            self._let_in()
        self._held = signum, frame
