"""Who waits, in order of rank, and whose time may run out: one queue, however many schedulers admit from it."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable

from engine.serving.request import Request


class RequestQueue:
    """The requests that hold no pages.

    Attributes:
        waiting: in order of rank; the same list for ever.
    """

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self._timed: list[Request] = []  # those whose time may run out, running ones too

    def arrive(self, request: Request, arrival: float) -> None:
        """Notes when a request came, from when its time runs."""
        request.arrival = arrival
        if request.params.timeout is not None:
            self._timed.append(request)

    def wait(self, request: Request) -> None:
        """Queues a request that has arrived, or comes back."""
        insort(self.waiting, request, key=lambda request: request.rank)

    def late(self, clock: Callable[[], float]) -> list[Request]:
        """The unfinished requests whose time is up by now."""
        if not self._timed:
            return []
        now = clock()
        self._timed = [request for request in self._timed if request.finish_reason is None]
        return [request for request in self._timed if request.is_late(now)]
