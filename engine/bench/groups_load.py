"""A closed loop of requests through the real scheduler over a pretend device: whoever ends is replaced at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.bench.groups_designs import PAGE_SIZE, STEP_TOKENS, WINDOW, WINDOWED_GROUPS, Design
from engine.memory.integers import Int32
from engine.memory.manager import CacheManager
from engine.memory.scope import CacheScope, LayoutKey
from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.replica import Replica
from engine.serving.plan.scheduler import Scheduler
from engine.serving.plan.step import ScheduledStep
from engine.serving.request import Request
from engine.serving.sampling_params import SamplingParams

SCOPE = CacheScope("model", 0, None, "", LayoutKey.of({"version": 1}))
SAMPLED = 7  # the token that the pretend device samples


@dataclass(frozen=True)
class Traffic:
    """Requests to draw.

    Attributes:
        name: for the tables.
        kinds: of each kind of request, equally often: the least and most tokens of prompt and answer together, and the
            part of them that is the answer.
    """

    name: str
    kinds: tuple[tuple[int, int, float], ...]

    @property
    def longest(self) -> int:
        """Most tokens of a request."""
        return max(most for _, most, _ in self.kinds)

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """Tokens of a prompt and of its answer."""
        least, most, part = self.kinds[rng.integers(len(self.kinds))]
        total = int(rng.integers(least, most + 1))
        answer = int(total * part)
        return total - answer, answer

    def most_requests(self, units: int) -> int:
        """More requests than can run at once in ``units``, in any design."""
        least = min(least - int(least * part) for least, _, part in self.kinds) // PAGE_SIZE
        return units // (least + WINDOWED_GROUPS * min(least, WINDOW // PAGE_SIZE)) + 1


@dataclass(frozen=True)
class LoadResult:
    """What a design did under a load.

    Attributes:
        name: the design's.
        running: mean number of requests that ran at once.
        most_running: the largest number.
        finished: requests that ended in 1,000 steps.
        retractions: how often a request was retracted.
        waste, most_waste: share of the bytes that no query could read, in the mean and at most.
        free: mean share of the bytes that no request held, while requests waited.
    """

    name: str
    running: float
    most_running: int
    finished: float
    retractions: int
    waste: float
    most_waste: float
    free: float


class Engine:
    """A scheduler of one replica, whose device samples at once.

    Args:
        cache: its memory.
        max_requests: rows.
    """

    def __init__(self, cache: CacheManager, max_requests: int) -> None:
        self.queue = RequestQueue()
        self.replica = Replica(
            cache, self.queue, max_running_requests=max_requests, max_step_tokens=max(STEP_TOKENS, max_requests)
        )
        ticks, self._ids = itertools.count(), itertools.count()
        self.scheduler = Scheduler([self.replica], self.queue, lambda: float(next(ticks)))

    def add(self, prompt: Int32, answer: int) -> Request:
        """Queues a request."""
        request = Request(next(self._ids), prompt, SamplingParams(max_new_tokens=answer), frozenset(), SCOPE)
        self.scheduler.add(request)
        return request

    def plan(self) -> ScheduledStep:
        """The next step, with its pages taken."""
        step = self.scheduler.next_step()
        if step is None:
            raise RuntimeError("the scheduler planned no step although every step was committed; this is a bug")
        return step

    def commit(self, step: ScheduledStep) -> list[Request]:
        """Books the step as run; returns the requests that have ended."""
        finished: list[Request] = []
        self.scheduler.commit(step, np.full(len(step.parts[0].requests), SAMPLED, np.int32), finished)
        return finished


def run_load(
    make: Callable[[int, int, int], Design], traffic: Traffic, units: int, steps: int, seed: int = 0
) -> LoadResult:
    """Runs as many clients as keep requests waiting, each with one request at a time.

    Args:
        make: makes the design from units, rows and the longest request.
        traffic: what the clients ask for; equal seeds give equal requests to every design.
        units: bytes of the memory, in units of ``groups_designs``.
        steps: measured steps, after half as many to fill the memory.
        seed: of the requests' lengths.
    """
    rows = traffic.most_requests(units)
    design = make(units, rows, traffic.longest)
    engine, rng = Engine(design.cache, rows), np.random.default_rng(seed)
    zeros = np.zeros(traffic.longest, np.int32)

    def ask() -> None:
        prompt, answer = traffic.draw(rng)
        engine.add(zeros[:prompt], answer)

    for _ in range(rows + 1):
        ask()
    ended, samples = 0, []
    for at in range(steps // 2 + steps):
        step = engine.plan()
        is_measured = at >= steps // 2
        if is_measured:
            samples.append(_sample(design, engine, step))
        finished = engine.commit(step)
        ended += len(finished) * is_measured
        for _ in finished:
            ask()
    design.cache.check_integrity()
    running, waste, free = np.array(samples).T
    return LoadResult(
        name=design.name,
        running=float(running.mean()),
        most_running=int(running.max()),
        finished=1_000 * ended / steps,
        retractions=engine.scheduler.retractions,
        waste=float(waste.mean()) / units,
        most_waste=float(waste.max()) / units,
        free=float(free.mean()) / units,
    )


def _sample(design: Design, engine: Engine, step: ScheduledStep) -> tuple[int, float, int]:
    """Running requests, wasted units and free units, while a step runs."""
    part = step.parts[0]
    rows = np.array([request.req_pool_idx for request in engine.replica.running], np.int32)
    next_query = np.zeros(design.cache.page_table.max_requests, np.int64)
    next_query[rows] = design.cache.page_table.kv_lens(rows)
    next_query[part.req_pool_idx] = part.starts  # the step's own tokens are written and read by it
    wasted = sum(each.wasted_units(rows, next_query[rows]) for each in design.parts)
    return rows.size, wasted, sum(each.free_units for each in design.parts)
