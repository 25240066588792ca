"""Decides which requests run in the next step, and how many tokens of each; always over a list of replicas.

Runs on the host and never sees a buffer. Each step has a budget of new tokens per replica. Decoding requests come
first, one token each, so that a long prompt cannot stall them; what is left of the budget goes to prompts that are
under way, in chunks; then waiting requests are admitted while a row is free and the cache has room for the tokens that
they know.

When a pool is full, the last in rank of its running requests is retracted: its pages go back (full ones stay cached
while there is room, or move to the host tier), and it waits again with the tokens it has. The first in rank is never
retracted while another runs, and no request is admitted that would not fit alone, so there is always progress.

Rank is arrival less priority: a request that does not fit is not overtaken by a later one of its own priority, and a
higher priority is worth a bounded head start, so no request starves.

All requests wait in one queue. The first goes to the replica where most of its prompt is cached, or being computed,
unless that one is much fuller than the emptiest; else, and where it does not fit there, to the emptiest that has room.
While no replica has room, none behind it is admitted. Once admitted a request stays until it ends or is retracted; then
it waits again, for any of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from engine.memory.integers import Bool, Int32
from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.replica import Replica
from engine.serving.plan.step import ScheduledStep, StepPlan
from engine.serving.request import FinishReason, Request, RequestState
from engine.trace.recorder import Recorder

# A replica's pool divided by this: with so many tokens more than the emptiest replica it counts as much fuller.
MUCH_FULLER_DIVISOR = 4


class Scheduler:
    """Plans and books the steps of every replica.

    Args:
        replicas: at least one, equal in their sizes; each admits from ``queue``.
        queue: where requests wait.
        clock: seconds, for arrival and timeouts.
        recorder: is told when a step begins, and what becomes of requests; None where nothing is recorded.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        queue: RequestQueue,
        clock: Callable[[], float] = time.monotonic,
        recorder: Recorder | None = None,
    ) -> None:
        self.replicas = replicas
        self.queue = queue
        self.waiting = queue.waiting  # in order of rank
        self.clock = clock
        self.recorder = recorder
        self._much_fuller = replicas[0].cache.size // MUCH_FULLER_DIVISOR

    @property
    def running(self) -> list[Request]:
        """The requests that have a row, replica by replica, in order of admission."""
        return [request for replica in self.replicas for request in replica.running]

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting) or any(replica.running for replica in self.replicas)

    @property
    def retractions(self) -> int:
        """How often a request was retracted."""
        return sum(replica.retractions for replica in self.replicas)

    @property
    def held_tokens(self) -> int:
        """Tokens in pages that running requests keep."""
        return sum(replica.cache.held_tokens for replica in self.replicas)

    @property
    def max_step_tokens(self) -> int:
        """Most new tokens in a step."""
        return sum(replica.max_step_tokens for replica in self.replicas)

    def check_fits(self, request: Request) -> None:
        """Refuses a request that no replica could ever run; raises RequestTooLarge."""
        self.replicas[0].check_fits(request)

    def add(self, request: Request) -> None:
        """Queues a request; raises RequestTooLarge where it could never run."""
        self.check_fits(request)
        self.queue.arrive(request, self.clock())
        self.queue.wait(request)

    def next_step(self, *, settled: bool = True) -> ScheduledStep | None:
        """Chooses the rows of the next step and gives them their pages.

        Args:
            settled: whether every step before this one has been committed. If not, it plans without seeing the tokens
                that they sample: a request that ends by its length is left out, one that may stop by a token is not.

        Returns:
            The step; None if a pool is short while a step is under way: commit that first, since the choice of the
            request to retract needs its results.
        """
        if self.recorder is not None:
            self.recorder.begin_step(len(self.waiting))
        plans: list[StepPlan] = []
        for replica in self.replicas:
            plan = replica.plan_running(settled=settled)
            if plan is None:
                return None
            plans.append(plan)
        admitted: list[Request] = []
        while self.waiting and (request := self._admit_first(plans)) is not None:
            admitted.append(request)
        parts = [replica.schedule(plan) for replica, plan in zip(self.replicas, plans, strict=True)]
        moves = [(replica.index, move) for replica in self.replicas for move in replica.cache.take_moves()]
        return ScheduledStep(
            parts,
            moves,
            num_tokens=sum([part.num_tokens for part in parts]),
            num_decode_tokens=sum([part.num_decode_tokens for part in parts]),
            admitted=admitted,
        )

    def commit(self, step: ScheduledStep, tokens: Int32, finished: list[Request]) -> list[Bool | None]:
        """Books a step that has run, as ``Replica.commit``.

        Args:
            step: the step, with a part for each replica.
            tokens: sampled tokens, equally many for each replica, one replica after the other.
            finished: the requests that finish are added to it.

        Returns:
            What each replica returns.
        """
        if len(self.replicas) == 1:
            return [self.replicas[0].commit(step.parts[0], tokens, finished)]
        by_replica = tokens.reshape(len(self.replicas), -1)
        parts = zip(self.replicas, step.parts, by_replica, strict=True)
        return [replica.commit(part, of_part, finished) for replica, part, of_part in parts]

    def sampled_rows(self, step: ScheduledStep) -> list[tuple[Request, int]]:
        """As ``Replica.sampled_rows``; every replica has as many rows of the results."""
        return [
            (request, replica.index * replica.max_running_requests + row)
            for replica, part in zip(self.replicas, step.parts, strict=True)
            for request, row in replica.sampled_rows(part)
        ]

    def fork(self, parent: Request, child: Request) -> None:
        """Starts ``child``, another answer to the parent's prompt, from the parent's pages, or else queues it.

        Raises:
            Exception: what the cache raises; the child has not started then.
        """
        has_started = self.replicas[parent.replica].fork(parent, child)
        self.queue.arrive(child, parent.arrival or 0.0)
        if not has_started:
            self.queue.wait(child)

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """Ends a request in any state and gives back every page it holds; does nothing if it has ended."""
        state = request.state
        if state is RequestState.ENDED:
            return
        request.end(reason, error)
        if state is RequestState.WAITING:
            self.waiting.remove(request)
            if self.recorder is not None:
                self.recorder.note_request("end", request.replica, request.request_id, reason)
        elif state is RequestState.RUNNING:
            self.replicas[request.replica].release(request)

    def expire(self) -> list[Request]:
        """Ends the requests whose time is up; returns them."""
        late = self.queue.late(self.clock)
        for request in late:
            self.end(request, FinishReason.TIMEOUT)
        return late

    def restart(self, requests: Iterable[Request], *, keeps_pages: bool = True) -> None:
        """Takes back every step that was planned and not committed: all wait again with the tokens that they have.

        For use after a fault, which may have come between any two changes: books that do not balance are cleared.

        Args:
            requests: all requests; those that have arrived and not ended will wait.
            keeps_pages: whether the pool's contents are valid, so that computed pages may stay cached.
        """
        members = list(requests)
        if self.recorder is not None:
            self.recorder.note_restart()
        for replica in self.replicas:
            replica.give_back_rows(keeps_pages=keeps_pages)
        for request in members:
            request.restart()
        self.queue.restart(request for request in members if request.state is RequestState.WAITING)

    def check_integrity(self) -> None:
        """Proves that every page of every replica is accounted for; else IntegrityError."""
        for replica in self.replicas:
            replica.check_integrity()

    def _admit_first(self, plans: Sequence[StepPlan]) -> Request | None:
        """Admits the request that is first to some replica, and returns it; None where there is none, or no room."""
        places = [index for index, plan in enumerate(plans) if self.replicas[index].has_place(plan)]
        request = self.queue.first() if places else None
        if request is None:
            return None
        self.queue.acting_for = request
        for index in self._by_preference(request, places):
            request.replica = index  # set before it has a row there, so that no fault can come between the two
            if self.replicas[index].admit(request, plans[index]):
                self.queue.acting_for = None
                return request
        self.queue.acting_for = None
        return None

    def _by_preference(self, request: Request, places: list[int]) -> list[int]:
        """Replicas in the order in which a request would go to them."""
        if len(places) < 2:
            return places
        planned = {index: self.replicas[index].planned_tokens for index in places}
        emptiest_first = sorted(places, key=planned.__getitem__)
        shared = {index: self.replicas[index].shared_tokens(request) for index in places}
        best = max(emptiest_first, key=shared.__getitem__)
        if not shared[best] or planned[best] - planned[emptiest_first[0]] > self._much_fuller:
            return emptiest_first
        return [best, *(index for index in emptiest_first if index != best)]
