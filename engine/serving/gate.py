"""How several threads use one engine: calls that change it take turns, and readers of metrics never hold one up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Generic, TypeVar

from engine.serving.interrupts import HeldInterrupts

# Of a busy engine a snapshot is made for other threads so often at most, and takes so small a part of its time.
SNAPSHOT_SECONDS = 0.05
SNAPSHOT_SHARE = 20

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class Gate:
    """A lock whose holders take turns.

    Steps follow one another without a pause, and a plain lock would let the next one in before a waiting thread. Here
    a thread that waits stands in the turnstile, so that the next step waits behind it.
    """

    def __init__(self) -> None:
        self.interrupts = HeldInterrupts()  # of a call that changes the engine
        self.driver: int | None = None  # the thread that held it last
        self.on_leave: Callable[[], None] = lambda: None  # called by a thread that is about to leave
        self._turnstile = threading.Lock()
        self._lock = threading.Lock()
        self._owner: int | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A call that changes the engine, perhaps within another one."""
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
        """For who only looks: whether nobody is inside, and until the end nobody will be."""
        if self._owner == threading.get_ident():
            yield True
            return
        entered = self._lock.acquire(blocking=False)
        try:
            yield entered
        finally:
            if entered:
                self._lock.release()


class SnapshotBoard(Generic[T]):
    """The last snapshot of an engine, for readers that must not hold it up.

    An engine that nobody is inside of is looked at as it is, once after each change, if it is idle or the reader is the
    thread that drives it. Else the engine is asked for another snapshot, and makes it at the end of a call, every
    ``SNAPSHOT_SECONDS`` at most and for a ``SNAPSHOT_SHARE``-th of its time; a reader waits for it as long, and so
    leaves the interpreter to the engine, and looks for itself if none came and nobody is inside.

    Args:
        make: looks at the engine.
        gate: the engine's.
        is_busy: whether the engine is between two steps of some request.
    """

    def __init__(self, make: Callable[[], T], gate: Gate, is_busy: Callable[[], bool]) -> None:
        self._make = make
        self._gate = gate
        self._is_busy = is_busy
        self._is_stale = False  # the engine has changed since
        self._is_wanted = False
        self._renewed = threading.Condition()
        self._due = 0.0  # from when another one may be made for other threads
        self._last = make()
        gate.on_leave = self._leave

    def read(self) -> T:
        """The snapshot; raises what making one raises."""
        with self._gate.tried() as can_look:
            if can_look and (not self._is_busy() or self._gate.driver == threading.get_ident()):
                if self._is_stale:
                    self._refresh()
                return self._last
        with self._renewed:
            self._is_wanted = True
            is_new = self._renewed.wait(SNAPSHOT_SECONDS)
        if not is_new:
            with self._gate.tried() as can_look:  # a busy engine that nobody drives just now
                if can_look and self._is_stale and time.monotonic() >= self._due:
                    self._refresh()
        return self._last

    def _leave(self) -> None:
        self._is_stale = True
        if self._is_wanted and time.monotonic() >= self._due:
            try:
                self._refresh()
            except Exception as error:  # the reader's to have, once it can look for itself; not that of a call
                _logger.error("no snapshot could be made of the engine: %s", error)

    def _refresh(self) -> None:
        begun = time.monotonic()
        try:
            self._last = self._make()
            self._is_stale = self._is_wanted = False
            with self._renewed:
                self._renewed.notify_all()
        finally:
            now = time.monotonic()
            self._due = now + max(SNAPSHOT_SECONDS, (now - begun) * SNAPSHOT_SHARE)
