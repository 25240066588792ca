"""One front over the schedulers of several replicas: which of them a request goes to, and their steps as one.

All requests wait in one queue, in order of rank. Who is first goes to the replica that has most of its prompt cached,
unless that one is much fuller than the emptiest; else, and where it does not fit there, to the emptiest that has room.
While no replica has, nobody behind it is let in: the order is that of one scheduler, and a replica that runs nobody has
room for anyone. Once admitted a request stays until it ends or is retracted; then it waits again, for any of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from engine.memory.integers import Int32
from engine.serving.plan.queue import QueueFront, RequestQueue
from engine.serving.plan.scheduler import Scheduler
from engine.serving.plan.step import PageCopy, ScheduledStep, StepPlan
from engine.serving.request import FinishReason, Request

# Of a replica's pool: with so many more tokens of requests than the emptiest has, it is much fuller.
MUCH_FULLER_SHARE = 4


class Balancer(QueueFront):
    """A ``Scheduler`` over several; what it says of rows and results is of all replicas, one after the other.

    Args:
        replicas: equal in their sizes; each admits from ``queue``.
        queue: where requests wait.
        clock: seconds, for arrival and timeouts.
    """

    def __init__(
        self, replicas: Sequence[Scheduler], queue: RequestQueue, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(queue, clock)
        self.replicas = replicas
        self._much_fuller = replicas[0].cache.size // MUCH_FULLER_SHARE

    @property
    def running(self) -> list[Request]:
        """Those that have a page-table row, replica by replica."""
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
        return sum(replica.held_tokens for replica in self.replicas)

    @property
    def max_step_tokens(self) -> int:
        """Most new tokens in a step."""
        return sum(replica.max_step_tokens for replica in self.replicas)

    def check_fits(self, request: Request) -> None:
        """Refuses a request that no replica could ever run; raises RequestTooLarge."""
        self.replicas[0].check_fits(request)

    def next_step(self, *, settled: bool = True) -> ScheduledStep | None:
        """Plans a step of every replica, as ``Scheduler.next_step``.

        It repeats the one before it where every replica can.
        """
        if all(replica.is_steady for replica in self.replicas) and all(each.can_repeat() for each in self.replicas):
            return _joined([replica.repeat() for replica in self.replicas])
        plans: list[StepPlan] = []
        for replica in self.replicas:
            plan = replica.plan_running(settled=settled)
            if plan is None:
                return None
            plans.append(plan)
        while self.waiting and self._admit_first(plans):
            pass
        return _joined([replica.schedule(plan) for replica, plan in zip(self.replicas, plans, strict=True)])

    def commit(self, step: ScheduledStep, tokens: Int32, finished: list[Request]) -> None:
        """Books a step that has run, as ``Scheduler.commit``.

        Args:
            step: of all replicas.
            tokens: as many for each replica, one after the other.
            finished: the requests that finish are added to it.
        """
        by_replica = tokens.reshape(len(self.replicas), -1)
        for replica, part, of_part in zip(self.replicas, step.parts, by_replica, strict=True):
            replica.commit(part, of_part, finished)

    def sampled_rows(self, step: ScheduledStep) -> list[tuple[Request, int]]:
        """As ``Scheduler.sampled_rows``; every replica has as many rows of the results."""
        return [
            (request, index * replica.max_running_requests + row)
            for index, (replica, part) in enumerate(zip(self.replicas, step.parts, strict=True))
            for request, row in replica.sampled_rows(part)
        ]

    def give_back_rows(self, *, keeps_pages: bool) -> None:
        """Ends every row of every replica, see ``QueueFront``."""
        for replica in self.replicas:
            replica.give_back_rows(keeps_pages=keeps_pages)

    def fork(self, parent: Request, child: Request) -> PageCopy | None:
        """Starts ``child`` from the pages of ``parent``, on the parent's replica, as ``Scheduler.fork``."""
        return self.replicas[parent.replica].fork(parent, child)

    def end(self, request: Request, reason: FinishReason) -> None:
        """Ends a request wherever it stands and gives back every page it holds; does nothing if it has ended."""
        self.replicas[request.replica].end(request, reason)

    def _admit_first(self, plans: Sequence[StepPlan]) -> bool:
        """Admits who waits first to some replica; returns whether one had room."""
        places = [index for index, plan in enumerate(plans) if self.replicas[index].has_place(plan)]
        request = self.queue.first()
        if request is None:
            return False
        for index in self._by_preference(request, places):
            request.replica = index  # before it has a row there: nothing may come between the two
            if self.replicas[index].admit_first(plans[index]):
                return True
        return False

    def _by_preference(self, request: Request, places: list[int]) -> list[int]:
        """Replicas in the order in which a request would go to them."""
        if len(places) < 2:
            return places
        tokens = request.tokens(0, request.num_tokens)
        known = {index: self.replicas[index].known_tokens for index in places}
        emptiest_first = sorted(places, key=known.__getitem__)
        cached = {index: self.replicas[index].cache.cached_tokens(request.scope, tokens) for index in places}
        best = max(emptiest_first, key=cached.__getitem__)
        if not cached[best] or known[best] - known[emptiest_first[0]] > self._much_fuller:
            return emptiest_first
        return [best, *(index for index in emptiest_first if index != best)]


def _joined(parts: Sequence[ScheduledStep]) -> ScheduledStep:
    return ScheduledStep(
        requests=[request for part in parts for request in part.requests],
        req_pool_idx=np.concatenate([part.req_pool_idx for part in parts]),
        starts=np.concatenate([part.starts for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
        is_decode=np.concatenate([part.is_decode for part in parts]),
        on_device=np.concatenate([part.on_device for part in parts]),
        samples=np.concatenate([part.samples for part in parts]),
        ends=np.concatenate([part.ends for part in parts]),
        tenancies=np.concatenate([part.tenancies for part in parts]),
        num_tokens=sum(part.num_tokens for part in parts),
        num_decode_tokens=sum(part.num_decode_tokens for part in parts),
        parts=tuple(parts),
    )
