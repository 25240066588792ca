"""Which requests wait, in order of rank, and which may run out of time: one queue for all schedulers that admit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Callable, Iterable

from engine.serving.request import FinishReason, Request


class RequestQueue:
    """The requests that hold no pages.

    Attributes:
        waiting: in order of rank; the same list for ever.
        acting_for: the request on whose account something is done now: to blame if it fails.
        faults: what the prefix cache has raised for requests whose step was booked all the same.
    """

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self.acting_for: Request | None = None
        self.faults: list[Exception] = []
        self._timed: list[Request] = []  # those whose time may run out, running ones too
        self._suspects: list[tuple[Request, int]] = []  # with the tokens that each had

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

    def first(self) -> Request | None:
        """The request to admit next: the first in rank, or of several suspects one, once the one before is cleared."""
        suspect = self._suspect()
        if suspect is not None:
            return suspect if suspect.req_pool_idx is None else None
        return self.waiting[0] if self.waiting else None

    def suspect(self, requests: Iterable[Request]) -> None:
        """Notes that one of these requests makes steps fail: they are let in one by one, each to get a token first."""
        self._suspects = [(request, len(request.output)) for request in requests]

    def culprit(self, running: list[Request]) -> Request | None:
        """On whose account a step of ``running`` has failed, where that is certain."""
        suspect = self._suspect()
        if self.acting_for is not None:
            return self.acting_for
        if suspect is not None and suspect in running:
            return suspect
        return running[0] if len(running) == 1 else None

    def restart(self, requests: Iterable[Request]) -> None:
        """Queues just these requests, which have arrived and not ended."""
        every = sorted(requests, key=lambda request: request.rank)
        self.waiting[:] = every
        self._timed = [request for request in every if request.params.timeout is not None]
        self.acting_for = None
        self.faults.clear()

    def _suspect(self) -> Request | None:
        """The first suspect that has neither ended nor got a token since."""
        while self._suspects:
            request, tokens = self._suspects[0]
            if request.finish_reason is None and len(request.output) == tokens:
                return request
            del self._suspects[0]
        return None


class QueueFront(ABC):
    """Lets requests into a queue and ends those whose time is up: what one scheduler and a front of several share.

    Args:
        queue: where requests wait.
        clock: seconds, for arrival and timeouts.
    """

    def __init__(self, queue: RequestQueue, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.waiting = queue.waiting  # in order of rank
        self.queue = queue

    @abstractmethod
    def check_fits(self, request: Request) -> None:
        """Refuses a request that could never run; raises RequestTooLarge."""

    @abstractmethod
    def end(self, request: Request, reason: FinishReason) -> None:
        """Ends a request wherever it stands and gives back every page it holds; does nothing if it has ended."""

    @abstractmethod
    def give_back_rows(self, *, keeps_pages: bool) -> None:
        """Ends every row, whatever state a fault has left the books in; no request keeps one."""

    def add(self, request: Request) -> None:
        """Queues a request; raises RequestTooLarge where it could never run."""
        self.check_fits(request)
        self.queue.arrive(request, self.clock())
        self.queue.wait(request)

    def expire(self) -> list[Request]:
        """Ends the requests whose time is up; returns them."""
        late = self.queue.late(self.clock)
        for request in late:
            self.end(request, FinishReason.TIMEOUT)
        return late

    def restart(self, requests: Iterable[Request], *, keeps_pages: bool = True) -> None:
        """Takes back every step that was planned and not committed: all wait again with the tokens that they have.

        For after a fault, which may have come between any two changes: books that do not balance are begun anew.

        Args:
            requests: every request that there is; those that have arrived and not ended will wait.
            keeps_pages: whether pages hold what the books say, so that what was computed may stay cached.
        """
        members = list(requests)
        self.give_back_rows(keeps_pages=keeps_pages)
        for request in members:
            request.req_pool_idx = None
            request.begin(0)
        self.queue.restart(r for r in members if r.arrival is not None and r.finish_reason is None)
