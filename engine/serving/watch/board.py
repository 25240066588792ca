"""The last snapshot of an engine's metrics, for readers in other threads that must never hold the engine up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from engine.serving.gate import Gate

# A busy engine makes a snapshot for other threads so often at most, and spends so small a part of its time on it.
SNAPSHOT_SECONDS = 0.05
SNAPSHOT_TIME_DIVISOR = 20

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class SnapshotBoard(Generic[T]):
    """Makes snapshots of an engine at a bounded cost, and returns the last one.

    A reader makes the snapshot itself, once after each change, where no call is in progress and the engine is idle or
    driven by the reader's own thread. Otherwise the reader asks for a snapshot and waits for up to
    ``SNAPSHOT_SECONDS``, which leaves the interpreter to the engine. The engine makes it at the end of a call, at most
    once in ``SNAPSHOT_SECONDS`` and in at most ``1 / SNAPSHOT_TIME_DIVISOR`` of its time. If none came and no call is
    in progress, the reader makes the snapshot itself.

    Args:
        make: reads the engine.
        gate: the engine's gate.
        is_busy: whether the engine has unfinished requests.
    """

    def __init__(self, make: Callable[[], T], gate: Gate, is_busy: Callable[[], bool]) -> None:
        self._make = make
        self._gate = gate
        self._is_busy = is_busy
        self._is_stale = False  # the engine has changed since the last snapshot
        self._is_wanted = False  # a reader waits for another one
        self._renewed = threading.Condition()
        self._due = 0.0  # the time from which another one may be made for other threads
        self._last = make()
        gate.on_leave = self._leave

    def read(self) -> T:
        """The last snapshot; raises what making one raises."""
        with self._gate.tried() as can_look:
            if can_look and (not self._is_busy() or self._gate.driver == threading.get_ident()):
                if self._is_stale:
                    self._refresh()
                return self._last
        with self._renewed:
            self._is_wanted = True
            is_new = self._renewed.wait(SNAPSHOT_SECONDS)
        if not is_new:
            with self._gate.tried() as can_look:  # a busy engine that no thread drives just now
                if can_look and self._is_stale and time.monotonic() >= self._due:
                    self._refresh()
        return self._last

    def _leave(self) -> None:
        self._is_stale = True
        if self._is_wanted and time.monotonic() >= self._due:
            try:
                self._refresh()
            except Exception as error:  # a reader gets it when it makes one itself; the call did not cause it
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
            self._due = now + max(SNAPSHOT_SECONDS, (now - begun) * SNAPSHOT_TIME_DIVISOR)
