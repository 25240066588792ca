"""The shipped Scheduler over a shipped CacheManager, with a pretended runner that keeps what a device keeps.

The runner has its own page table, made of nothing but what steps say, the last token of each row, and the number of the
prefix in each slot. It runs a step when it is dispatched, as a device runs them in that order; what it has sampled is
known to the scheduler when the step is committed. Before that another step may be planned, requests may come, be
aborted or the engine may fail.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from manager_world import LAYOUT, POISON, number_of
from scheduler_form import scheduler_form
from snapshots import keep_as_they_are

from engine.memory.manager import CacheManager
from engine.memory.page_moves import PageCopy
from engine.memory.scope import CacheScope
from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.replica import Replica
from engine.serving.plan.scheduler import Scheduler
from engine.serving.request import FinishReason, Request, RequestState
from engine.serving.sampling_params import SamplingParams

SCOPE = CacheScope("model", 0, None, "", LAYOUT)
STOP = 1
NO_TOKEN = -1  # what a step has sampled where the logits are not finite


@dataclass(frozen=True)
class SchedulerScope:
    """How small the world is.

    Attributes:
        pages, page_size, rows: as of the manager.
        budget: most tokens of a step.
        requests: of each request its prompt, the most tokens of its answer and its priority.
        tokens: what a step may sample: ``STOP`` ends an answer, ``NO_TOKEN`` is none.
        windows: as of the manager.
        flights: most steps that are dispatched and not committed.
        without: moves that are left out, by name.
    """

    pages: int
    page_size: int
    rows: int
    budget: int
    requests: tuple[tuple[tuple[int, ...], int, int], ...]
    tokens: tuple[int, ...] = (0, STOP)
    windows: tuple[int | None, ...] = (None,)
    flights: int = 2
    without: tuple[str, ...] = ()


class Clock:
    """Every moment is later than the one before."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


keep_as_they_are(SchedulerScope, SamplingParams)


class SchedulerWorld:
    def __init__(self, scope: SchedulerScope) -> None:
        self.scope = scope
        size = scope.page_size
        self.requests = [
            Request(number, np.array(prompt, np.int32), SamplingParams(max_new_tokens=new, priority=priority),
                    frozenset([STOP]), SCOPE)
            for number, (prompt, new, priority) in enumerate(scope.requests)
        ]  # fmt: skip
        context = max(request.max_tokens for request in self.requests)
        self.cache = CacheManager(scope.pages * size, size, scope.rows, context, windows=scope.windows)
        queue = RequestQueue()
        replica = Replica(self.cache, queue, max_running_requests=scope.rows, max_step_tokens=scope.budget)
        self.scheduler = Scheduler([replica], queue, Clock())
        table = self.cache.page_table
        self.flights: deque[tuple[Any, list[int]]] = deque()
        # What the device has.
        self.content = [[POISON] * size for _ in range(scope.pages + 1)]
        self.device_table = np.zeros((scope.rows, table.num_groups, table.max_pages), np.int32)
        self.fed: list[list[int]] = [[] for _ in range(scope.rows)]  # the tokens of each row's slots
        self.last: list[int] = [0] * scope.rows
        self.generations: list[int] = [0] * scope.rows

    def moves(self) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        for number, request in enumerate(self.requests):
            if request.state is RequestState.NEW:
                found.append(("arrive", number))
            elif request.state is not RequestState.ENDED:
                found.append(("abort", number))
        if self.scheduler.has_work and len(self.flights) < self.scope.flights:
            found += [("step", token) for token in self.scope.tokens]
        if self.flights:
            found.append(("commit",))
        if self.scheduler.has_work or self.flights:
            found += [("fault", True), ("fault", False)]
        if self.cache.prefix.cached_pages:
            found.append(("reset",))
        return [move for move in found if move[0] not in self.scope.without]

    def play(self, move: tuple[Any, ...]) -> bool:
        getattr(self, "_" + move[0])(*move[1:])
        self._forget_rows()
        self._poison()
        return False

    def _arrive(self, number: int) -> None:
        self.scheduler.add(self.requests[number])

    def _abort(self, number: int) -> None:
        self.scheduler.end(self.requests[number], FinishReason.ABORT)

    def _step(self, token: int) -> None:
        """Plans and dispatches a step as ``Stepper.advance`` does: where none can be planned, one is booked first."""
        scheduler = self.scheduler
        while (step := scheduler.next_step(settled=not self.flights)) is None:
            assert self.flights, "a step waits for one that is not there"
            self._commit()
        assert not scheduler.queue.faults
        self._make_moves(step.moves)
        if not self.flights:
            assert scheduler.running or not scheduler.has_work, "requests wait, none runs, and none is admitted"
            assert step.num_tokens or not scheduler.has_work, "requests run, and no step is to feed them anything"
        assert step.num_tokens <= max(self.scope.budget, self.scope.rows)
        if step.num_tokens:
            self._dispatch(step.parts[0], token)
            self.flights.append((step, [token] * len(step.parts[0].requests)))
        elif self.flights:
            self._commit()

    def _make_moves(self, moves: Any) -> None:
        for _, move in moves:
            if isinstance(move, PageCopy):
                data = [list(self.content[page]) for page in move.sources.tolist()]
                for page, each in zip(move.targets.tolist(), data, strict=True):
                    self.content[page] = each

    def _dispatch(self, part: Any, token: int) -> None:
        self._forget_rows()
        size, windows = self.scope.page_size, self.scope.windows
        places, pages = part.new_pages
        self.device_table.reshape(-1)[places] = pages
        rows = zip(part.requests, part.req_pool_idx.tolist(), part.rows, strict=True)
        assert len(set(part.req_pool_idx.tolist())) == len(part.requests), "a row is twice in a step"
        for request, row, plan in rows:
            start, stop = plan.start, plan.start + plan.count
            fed, known = self.fed[row], request.tokens(0, request.num_tokens).tolist()
            if plan.is_decode:
                assert plan.count == 1
                assert fed[: len(known)] == known[: len(fed)], "the device has other tokens than the request"
                fed[start:] = [self.last[row]]
            else:
                assert stop <= len(known), "tokens are fed that nobody knows"
                fed[:] = known[:stop]
            assert len(fed) == stop, "a step leaves a gap"
            for group, window in enumerate(windows):
                held = self.device_table[row, group].tolist()
                for position in range(0 if window is None else max(0, start - window + 1), start):
                    number = self.content[held[position // size]][position % size]
                    right = number_of(0, group, tuple(fed[: position + 1]))
                    assert number == right, f"request {request.request_id} reads at {position} what is not its prefix"
                for position in range(start, stop):
                    page = held[position // size]
                    assert page > 0, "a token is written to the null page"
                    assert self.cache.allocator.pages.ref_count([page])[0] == 1, "a shared page is written"
                    self.content[page][position % size] = number_of(0, group, tuple(fed[: position + 1]))
            if plan.samples:
                self.last[row] = token

    def _forget_rows(self) -> None:
        """Forgets what the device has of rows that were given back: another request begins them anew."""
        now = self.cache.page_table._generation.tolist()
        for row, (before, after) in enumerate(zip(self.generations, now, strict=True)):
            if before != after:
                self.fed[row], self.last[row] = [], 0
        self.generations = now

    def _commit(self) -> None:
        step, tokens = self.flights.popleft()
        finished: list[Request] = []
        live = {id(request) for request, _ in self.scheduler.sampled_rows(step)}
        before = {id(request): len(request.output) for request in self.requests}
        self.scheduler.commit(step, np.array([*tokens, 0, 0], np.int32), finished)
        for request in self.requests:
            gained = len(request.output) - before[id(request)]
            assert gained == (id(request) in live and tokens[0] != NO_TOKEN), "a token is lost, or is one too many"
        for request in finished:
            self._check_answer(request)
        if not self.scheduler.has_work:
            self.flights.clear()

    def _fault(self, keeps_pages: bool) -> None:
        self.flights.clear()
        if not keeps_pages:
            self.content = [[POISON] * self.scope.page_size for _ in self.content]
        self.scheduler.restart(self.requests, keeps_pages=keeps_pages)

    def _reset(self) -> None:
        self.cache.reset_prefix_cache()

    def _check_answer(self, request: Request) -> None:
        assert request.state is RequestState.ENDED
        if request.finish_reason is FinishReason.STOP:
            assert request.output[-1] == STOP
        elif request.finish_reason is FinishReason.LENGTH:
            assert len(request.output) == request.params.max_new_tokens
        else:
            assert request.finish_reason is FinishReason.NON_FINITE
        assert STOP not in request.output[:-1], "an answer goes on after its end"

    def _poison(self) -> None:
        holders, moves = self.cache.allocator.pages._ref_count.tolist(), self.cache._moves
        read = {page for move in moves for page in (move.sources.tolist() if isinstance(move, PageCopy) else ())}
        for page, slots in enumerate(self.content):
            if page not in read and not (holders[page] and page):
                slots[:] = [POISON] * self.scope.page_size

    def form(self) -> tuple[Any, ...]:
        return scheduler_form(self)

    def check(self) -> None:
        """Books that balance, and contents of what can be found and of what runs."""
        self.scheduler.check_integrity()
        assert not self.scheduler.queue.faults
        waiting = {request.request_id for request in self.scheduler.waiting}
        running = {request.request_id for request in self.scheduler.running}
        for request in self.requests:
            is_waiting, is_running = request.request_id in waiting, request.request_id in running
            assert is_waiting == (request.state is RequestState.WAITING)
            assert is_running == (request.state is RequestState.RUNNING) == (request.req_pool_idx is not None)
        ranks = [request.rank for request in self.scheduler.waiting]
        assert ranks == sorted(ranks), "a request has lost its place"
        for _, tokens, pages, group in self.cache.prefix.runs():
            slots = [number for page in pages.tolist() for number in self.content[page]]
            right = [number_of(0, group, tuple(tokens[: end + 1].tolist())) for end in range(tokens.size)]
            assert slots == right[-len(slots) :], "cached pages hold other tokens"
        held = set(self.cache.page_table.held_pages().tolist())
        cached = set(self.cache.prefix.pages().tolist())
        assert self.cache.allocator.pages.available + len(held | cached) == self.scope.pages, "a page is lost"

    def way_on(self, *, overlaps: bool) -> tuple[Any, ...] | None:
        """The move of an engine that nobody else disturbs; None where every request that has come has ended."""
        if not self.scheduler.has_work:
            return None
        if self.flights and (not overlaps or len(self.flights) >= self.scope.flights):
            return ("commit",)
        return ("step", 0)
