"""Decides who runs in the next step, and how many tokens of each.

Runs on the host and never sees a buffer. Each step has a budget of new tokens. Decoding requests come first, one
token each, so that a long prompt cannot stall them; what is left of the budget goes to prompts, in order of arrival,
in chunks; then waiting requests are admitted while a slot is free and the cache can promise them every token they
may need. The queue is first come, first served: a request that does not fit yet is never overtaken, so it cannot
starve.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from engine.errors import RequestTooLarge
from engine.memory.cache_manager import CacheManager, Int32
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
    """The rows of a step and ``[sum of counts]`` int32 slots for their new tokens."""

    rows: list[ScheduledRow]
    out_cache_loc: Int32


class Scheduler:
    """Continuous batching over a fixed number of slots.

    Args:
        cache: owns pages and page-table rows.
        max_running_requests: slots.
        max_step_tokens: most new tokens in a step; at least ``max_running_requests``, so that everyone can decode.
    """

    def __init__(self, cache: CacheManager, *, max_running_requests: int, max_step_tokens: int) -> None:
        self.cache = cache
        self.max_running_requests = max_running_requests
        self.max_step_tokens = max(max_step_tokens, max_running_requests)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

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
        self.waiting.append(request)

    def next_step(self) -> ScheduledStep:
        """Chooses the rows of the next step and gives them their slots."""
        budget = self.max_step_tokens
        rows = [ScheduledRow(r, r.num_computed, 1) for r in self.running if r.num_pending == 1]
        budget -= len(rows)
        for request in self.running:
            if request.num_pending > 1 and budget:
                rows.append(ScheduledRow(request, request.num_computed, min(request.num_pending, budget)))
                budget -= rows[-1].count
        while budget and self._admit_next():
            request = self.running[-1]
            rows.append(ScheduledRow(request, 0, min(request.num_pending, budget)))
            budget -= rows[-1].count
        return ScheduledStep(rows, self._grow(rows))

    def commit(self, step: ScheduledStep, tokens: Int32) -> list[Request]:
        """Books a step that has run; ``tokens[i]`` was sampled for row ``i``, padding may follow.

        Returns:
            The requests that finished; their pages are free.
        """
        finished = []
        for row, token in zip(step.rows, tokens[: len(step.rows)].tolist(), strict=True):
            request, samples = row.request, row.samples
            request.num_computed += row.count
            if samples:
                request.append(token)
            if request.finish_reason is not None:
                self._release(request)
                finished.append(request)
        return finished

    def undo(self, step: ScheduledStep) -> None:
        """Takes back a step that did not run: its requests give up their pages and wait again, in their order.

        The rows have grown by slots that hold nothing, and a row grows at its end only.
        """
        for row in reversed(step.rows):
            self._release(row.request)
            row.request.num_computed = 0
            self.waiting.appendleft(row.request)

    def abort(self, request: Request) -> None:
        """Ends a request wherever it stands and gives back every page it holds; does nothing if it has ended."""
        if request.finish_reason is not None:
            return
        request.finish_reason = FinishReason.ABORT
        if request in self.waiting:
            self.waiting.remove(request)
        else:
            self._release(request)

    def _admit_next(self) -> bool:
        if not self.waiting or len(self.running) == self.max_running_requests:
            return False
        request = self.waiting[0]
        if not self.cache.can_admit(request.max_tokens):
            return False
        request.req_pool_idx = self.cache.admit(request.max_tokens)
        self.running.append(self.waiting.popleft())
        return True

    def _grow(self, rows: list[ScheduledRow]) -> Int32:
        indices = np.array([row.request.req_pool_idx for row in rows], np.int32)
        counts = np.array([row.count for row in rows], np.int32)
        return self.cache.grow(indices, counts)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        if request.req_pool_idx is not None:
            self.cache.release(request.req_pool_idx)
            request.req_pool_idx = None
