"""The requests that wait, in order of rank, and those with a timeout: one queue for all replicas."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable

from engine.serving.request import Request, RequestState


class RequestQueue:
    """The requests that hold no pages.

    Attributes:
        waiting: in order of rank; always the same list object.
        acting_for: the request that the current operation is for; blamed if the operation fails.
        faults: what the prefix cache has raised for requests whose step was booked nevertheless.
    """

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self.acting_for: Request | None = None
        self.faults: list[Exception] = []
        self._timed: list[Request] = []  # requests with a timeout, running ones too
        self._suspects: list[tuple[Request, int]] = []  # suspected requests, with the number of tokens that each had

    def arrive(self, request: Request, arrival: float) -> None:
        """Notes the arrival of a request, from which its timeout counts."""
        request.arrival = arrival
        if request.params.timeout is not None:
            self._timed.append(request)

    def wait(self, request: Request) -> None:
        """Queues a request that has arrived or was retracted."""
        request.wait()
        insort(self.waiting, request, key=lambda request: request.rank)

    def late(self, clock: Callable[[], float]) -> list[Request]:
        """The unfinished requests whose time is up."""
        if not self._timed:
            return []
        now = clock()
        self._timed = [request for request in self._timed if request.state is not RequestState.ENDED]
        return [request for request in self._timed if request.is_late(now)]

    def first(self) -> Request | None:
        """The request to admit next: the first in rank; of several suspects one, once the one before it is cleared."""
        suspect = self._suspect()
        if suspect is not None:
            return suspect if suspect.state is RequestState.WAITING else None
        return self.waiting[0] if self.waiting else None

    def suspect(self, requests: Iterable[Request]) -> None:
        """Notes that one of these makes steps fail: each is admitted once the one before it has got a token."""
        self._suspects = [(request, len(request.output)) for request in requests]

    def culprit(self, running: list[Request]) -> Request | None:
        """The request that made a step of ``running`` fail, where that is certain."""
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
            if request.state is not RequestState.ENDED and len(request.output) == tokens:
                return request
            del self._suspects[0]
        return None
