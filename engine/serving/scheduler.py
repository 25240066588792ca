"""Decides who runs in the next step, and how many tokens of each.

Runs on the host and never sees a buffer. Each step has a budget of new tokens. Decoding requests come first, one
token each, so that a long prompt cannot stall them; what is left of the budget goes to prompts that are under way, in
chunks; then waiting requests are admitted while a slot is free and the cache has room for their known tokens.

When the pool is full, the last in rank of the running requests is retracted: its pages go back (full ones stay cached
while there is room, or move to the host tier), and it waits again with the tokens it has. The first in rank is never
retracted while another runs, and no request is admitted that would not fit alone, so somebody always gets on.

Rank is arrival less priority: a request that does not fit is not overtaken by a later one of its own priority, and a
higher priority is worth a bounded head start, so that nobody starves.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.errors import RequestTooLarge
from engine.memory.cache_manager import CacheManager
from engine.memory.integers import Int32
from engine.serving.request import FinishReason, Request


@dataclass(frozen=True)
class ScheduledRow:
    """One request's part of a step: ``count`` tokens from position ``start``."""

    request: Request
    start: int
    count: int

    def tokens(self) -> Int32:
        """Token ids of the row, int32 ``[count]``."""
        return self.request.tokens(self.start, self.start + self.count)

    @property
    def is_decode(self) -> bool:
        """Whether the row feeds back a generated token."""
        return self.start >= len(self.request.prompt)

    @property
    def samples(self) -> bool:
        """Whether the row's last token is the last one known, so that the next is to be chosen."""
        return self.start + self.count == self.request.num_tokens


@dataclass(frozen=True)
class ScheduledStep:
    """The rows of a step and ``[sum of counts]`` int32 slots for their new tokens; no rows where nothing is to run."""

    rows: list[ScheduledRow]
    out_cache_loc: Int32


@dataclass(frozen=True)
class PageCopy:
    """Pages that the device must copy before the next step, for answers that share a prompt."""

    sources: Int32
    targets: Int32


class Scheduler:
    """Continuous batching over a fixed number of slots.

    Args:
        cache: owns pages and page-table rows.
        max_running_requests: slots.
        max_step_tokens: most new tokens in a step; at least ``max_running_requests``, so that everyone can decode.
        clock: seconds, for arrival and timeouts.
    """

    def __init__(
        self,
        cache: CacheManager,
        *,
        max_running_requests: int,
        max_step_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cache = cache
        self.max_running_requests = max_running_requests
        self.max_step_tokens = max(max_step_tokens, max_running_requests)
        self.clock = clock
        self.waiting: list[Request] = []  # in order of rank
        self.running: list[Request] = []
        self.retractions = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    def check_fits(self, request: Request) -> None:
        """Refuses a request that could never run.

        Raises:
            RequestTooLarge: the whole pool is smaller than what the request may need.
        """
        needed, size = self.cache.round_up(request.max_tokens), self.cache.size
        if needed > size:
            most = size + 1 - len(request.prompt)
            advice = f"lower max_new_tokens to {most}" if most >= 1 else "shorten the prompt"
            raise RequestTooLarge(
                f"request of {len(request.prompt)} prompt and up to {request.params.max_new_tokens} new tokens can "
                f"never fit: it needs {needed} tokens of KV in whole pages, the pool has {size};"
                f" {advice} or raise max_total_tokens",
                requested=needed,
                available=size,
            )

    def add(self, request: Request) -> None:
        """Queues a request; raises RequestTooLarge where it could never run."""
        self.check_fits(request)
        request.arrival = self.clock()
        self._wait(request)

    def next_step(self) -> ScheduledStep:
        """Chooses the rows of the next step and gives them their slots."""
        rows, retractions = self._running_rows(), self.retractions
        while not self.cache.can_grow(*_growth(rows)):
            self._retract(max(self.running, key=lambda request: request.rank))
            rows = self._running_rows()
        budget = self.max_step_tokens - sum(row.count for row in rows)
        # Who was just retracted must not come straight back, or the two would take turns without getting on; but one
        # that runs alone was in its own way, with a copy of pages that are cached, and comes back to share those.
        may_admit = retractions == self.retractions or not rows
        while may_admit and budget and self._admit_next():
            request = self.running[-1]
            rows.append(ScheduledRow(request, request.num_computed, min(request.num_pending, budget)))
            budget -= rows[-1].count
        return ScheduledStep(rows, self.cache.grow(*_growth(rows)))

    def commit(self, step: ScheduledStep, tokens: Int32) -> list[Request]:
        """Books a step that has run; ``tokens[i]`` was sampled for row ``i``, padding may follow.

        Returns:
            The requests that finished; what they held is free or cached.
        """
        finished = []
        for row, token in zip(step.rows, tokens[: len(step.rows)].tolist(), strict=True):
            request, samples = row.request, row.samples
            request.num_computed += row.count
            if not row.is_decode:
                self._publish(request)
            if samples:
                request.append(token)
            if request.finish_reason is not None:
                self._release(request)
                finished.append(request)
        return finished

    def undo(self, step: ScheduledStep) -> None:
        """Takes back a step that did not run: its requests give up their rows and wait again.

        The rows have grown by slots that hold nothing, and a row grows at its end only. What was computed before is
        still cached.
        """
        for row in step.rows:
            self.give_up(row.request)

    def fork(self, parent: Request, child: Request) -> PageCopy | None:
        """Starts ``child``, another answer to the prompt that ``parent`` has just computed, from the parent's pages.

        The child computes the prompt's last token itself, since it draws from that token's logits.

        Returns:
            The copy of the prompt's partial last page that the device must make; None where none is needed, or where
            there is no room now: then the child waits its turn like any other request.

        Raises:
            Exception: what saving evicted pages raises; the child has not started then.
        """
        shared = len(parent.prompt) - 1
        row, has_slot = parent.req_pool_idx, len(self.running) < self.max_running_requests
        if row is None or not has_slot or not self.cache.can_fork(row, shared):
            child.arrival = parent.arrival
            self._wait(child)
            return None
        child.req_pool_idx, sources, targets = self.cache.fork(row, shared)
        child.arrival = parent.arrival
        child.num_computed = child.cached_tokens = shared
        self.running.append(child)
        return PageCopy(sources, targets) if sources.size else None

    def give_up(self, request: Request) -> None:
        """Sends a running request back to wait with the tokens it has; what it computed may stay cached."""
        self._release(request)
        request.num_computed = 0
        self._wait(request)

    def expire(self) -> list[Request]:
        """Ends the requests whose time is up; returns them."""
        now = self.clock()
        late = [request for request in (*self.waiting, *self.running) if request.is_late(now)]
        for request in late:
            self.end(request, FinishReason.TIMEOUT)
        return late

    def end(self, request: Request, reason: FinishReason) -> None:
        """Ends a request wherever it stands and gives back every page it holds; does nothing if it has ended."""
        if request.finish_reason is not None:
            return
        request.finish_reason = reason
        if request.req_pool_idx is None:
            self.waiting.remove(request)
        else:
            self._release(request)

    def _running_rows(self) -> list[ScheduledRow]:
        """What those who run already would like to do: decode first, then chunks of prompts in order of rank."""
        rows = [ScheduledRow(r, r.num_computed, 1) for r in self.running if r.num_pending == 1]
        budget = self.max_step_tokens - len(rows)
        for request in sorted(self.running, key=lambda request: request.rank):
            if request.num_pending > 1 and budget:
                rows.append(ScheduledRow(request, request.num_computed, min(request.num_pending, budget)))
                budget -= rows[-1].count
        return rows

    def _admit_next(self) -> bool:
        if not self.waiting or len(self.running) == self.max_running_requests:
            return False
        request = self.waiting[0]
        admission = self.cache.admit(
            request.scope,
            request.tokens(0, request.num_tokens),
            most_tokens=request.max_tokens,
            priority=request.params.priority,
            counts_hit=request.cached_tokens is None,
        )
        if admission is None:
            return False
        request.req_pool_idx = admission.row
        request.num_computed = admission.cached_tokens + admission.loaded_tokens
        if request.cached_tokens is None:
            request.cached_tokens = request.num_computed
        self.running.append(self.waiting.pop(0))
        return True

    def _retract(self, request: Request) -> None:
        self.give_up(request)
        request.retractions += 1
        self.retractions += 1

    def _wait(self, request: Request) -> None:
        insort(self.waiting, request, key=lambda request: request.rank)

    def _publish(self, request: Request) -> None:
        if request.req_pool_idx is not None:
            self.cache.publish(request.req_pool_idx, request.scope, request.tokens(0, request.num_computed))

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        if request.req_pool_idx is not None:
            # A step that was scheduled and did not run has grown the row by slots that hold nothing yet.
            computed = request.tokens(0, request.num_computed)
            self.cache.release(request.req_pool_idx, request.scope, computed)
            request.req_pool_idx = None


def _growth(rows: list[ScheduledRow]) -> tuple[Int32, Int32]:
    indices = np.array([row.request.req_pool_idx for row in rows], np.int32)
    return indices, np.array([row.count for row in rows], np.int32)
