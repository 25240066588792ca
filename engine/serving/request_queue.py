"""Who waits, in order of rank, and whose time may run out: one queue, however many schedulers admit from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Callable

from engine.serving.request import FinishReason, Request


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


class QueueFront(ABC):
    """Lets requests into a queue and ends those whose time is up: what one scheduler and a front of several share.

    Args:
        queue: where requests wait.
        clock: seconds, for arrival and timeouts.
    """

    def __init__(self, queue: RequestQueue, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.waiting = queue.waiting  # in order of rank
        self._queue = queue

    @abstractmethod
    def check_fits(self, request: Request) -> None:
        """Refuses a request that could never run; raises RequestTooLarge."""

    @abstractmethod
    def end(self, request: Request, reason: FinishReason) -> None:
        """Ends a request wherever it stands and gives back every page it holds; does nothing if it has ended."""

    def add(self, request: Request) -> None:
        """Queues a request; raises RequestTooLarge where it could never run."""
        self.check_fits(request)
        self._queue.arrive(request, self.clock())
        self._queue.wait(request)

    def expire(self) -> list[Request]:
        """Ends the requests whose time is up; returns them."""
        late = self._queue.late(self.clock)
        for request in late:
            self.end(request, FinishReason.TIMEOUT)
        return late
