"""How several threads use one engine: calls that change it take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from engine.serving.interrupts import HeldInterrupts


class Gate:
    """A lock that threads enter in turn.

    Steps follow one another without a pause, and a plain lock would let the next step in before a waiting thread. Here
    a waiting thread holds the turnstile, so that the next step waits behind it.
    """

    def __init__(self) -> None:
        self.interrupts = HeldInterrupts()  # while a call changes the engine
        self.driver: int | None = None  # the thread that held it last
        self.on_leave: Callable[[], None] = lambda: None  # called by a thread that is about to leave
        self._turnstile = threading.Lock()
        self._lock = threading.Lock()
        self._owner: int | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Encloses a call that changes the engine; one call may be made within another."""
        me = threading.get_ident()
        if self._owner == me:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(self.interrupts)
            with self._turnstile:
                stack.enter_context(self._lock)
            stack.callback(setattr, self, "_owner", None)
            self._owner = self.driver = me
            yield
            self.on_leave()

    @contextmanager
    def tried(self) -> Iterator[bool]:
        """Encloses a reader: yields whether no other thread is inside; then none enters before the end."""
        if self._owner == threading.get_ident():
            yield True
            return
        entered = self._lock.acquire(blocking=False)
        try:
            yield entered
        finally:
            if entered:
                self._lock.release()
