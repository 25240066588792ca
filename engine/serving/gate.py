"""Lets another thread look at the engine between two of its calls, never in the middle of one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from engine.serving.interrupts import HeldInterrupts

_POLL_SECONDS = 1e-4


class Gate:
    """A lock in which who looks goes first.

    Steps follow one another without a pause, and a plain lock would let the next one in before a waiting thread. With
    nobody looking the engine pays for one uncontended lock.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0  # of the engine's calls; written by who has the lock
        self._count_lock = threading.Lock()
        self._lookers = 0
        self.interrupts = HeldInterrupts()  # of a call that changes the engine

    def __enter__(self) -> None:
        """Begins a call that changes the engine, perhaps within another one."""
        while self._lookers and not self._depth:
            time.sleep(_POLL_SECONDS)
        self.interrupts.__enter__()
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._lock.release()
        self.interrupts.__exit__()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """For a thread that only reads: waits for the call that runs, and holds the next one up meanwhile."""
        with self._count_lock:
            self._lookers += 1
        try:
            with self._lock:
                yield
        finally:
            with self._count_lock:
                self._lookers -= 1
