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

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from engine.errors import IntegrityError, RequestTooLarge
from engine.memory.integers import Bool, Int32, Int64
from engine.memory.manager import CacheManager
from engine.serving.plan.decode_run import DecodeRun
from engine.serving.plan.queue import QueueFront, RequestQueue
from engine.serving.plan.running_rows import RunningRows
from engine.serving.plan.step import PageCopy, ScheduledStep, StepPlan
from engine.serving.request import FinishReason, Request

_logger = logging.getLogger(__name__)


class Scheduler(QueueFront):
    """Continuous batching over a fixed number of slots.

    Args:
        cache: owns pages and page-table rows.
        max_running_requests: slots.
        max_step_tokens: most new tokens in a step; at least ``max_running_requests``, so that everyone can decode.
        clock: seconds, for arrival and timeouts.
        queue: where requests wait; schedulers of several replicas share one.
        pool_name: what messages call the pool.
    """

    def __init__(
        self,
        cache: CacheManager,
        *,
        max_running_requests: int,
        max_step_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        queue: RequestQueue | None = None,
        pool_name: str = "the pool",
    ) -> None:
        super().__init__(queue or RequestQueue(), clock)
        self.cache = cache
        self.max_running_requests = max_running_requests
        self.max_step_tokens = max(max_step_tokens, max_running_requests)
        self.retractions = 0
        self._pool_name = pool_name
        self._plan = RunningRows(cache.page_table.max_requests)
        self._last_rows: Int32 | None = None  # of the last step that was planned
        self._second: ScheduledStep | None = None  # that step, if it was the second of its kind
        self._run: DecodeRun | None = None  # the steps that have repeated it

    @property
    def running(self) -> list[Request]:
        """Those that have a page-table row, in order of admission."""
        return self._plan.requests

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    @property
    def replicas(self) -> Sequence[Scheduler]:
        """The schedulers of all replicas: this one."""
        return (self,)

    @property
    def held_tokens(self) -> int:
        """Tokens in pages that running requests keep."""
        return self.cache.held_tokens

    @property
    def known_tokens(self) -> int:
        """Prompt and generated tokens of the running requests, those included that steps under way will sample."""
        return int(self._plan.known[self._plan.in_order()].sum())

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
                f"never fit: it needs {needed} tokens of KV in whole pages, {self._pool_name} has {size};"
                f" {advice} or raise max_total_tokens",
                requested=needed,
                available=size,
            )

    def next_step(self, *, settled: bool = True) -> ScheduledStep | None:
        """Chooses the rows of the next step and gives them their pages.

        Args:
            settled: whether every step before this one has been committed. If not, what they sample is planned for
                unseen: who ends by its length is left out, who may stop by a token is not.

        Returns:
            The step; None if the pool is short while a step is under way: commit that first, since who must give up
            its pages is decided when all is known.
        """
        if self.is_steady and self.can_repeat():
            return self.repeat()
        plan = self.plan_running(settled=settled)
        if plan is None:
            return None
        while self.waiting and self.has_place(plan) and self.admit_first(plan):
            pass
        return self.schedule(plan)

    @property
    def is_steady(self) -> bool:
        """Whether the last two steps were of all who run, decoding, since when nobody has come or gone or may come.

        Not after the first such step: making a run of steps costs as much as one, and often somebody comes or goes.
        """
        step = self._second
        if step is None or not self._plan.is_current(step.req_pool_idx):
            return False
        return not self.waiting or len(self.running) >= self.max_running_requests

    def can_repeat(self) -> bool:
        """Of a steady scheduler, whether its next step is the one before it, a token further, with room for it."""
        if self._run is None and self._second is not None:
            rows = self._second.req_pool_idx
            self._run = DecodeRun.after(self._second, self._plan, self.cache.page_table.decoding_rows(rows))
        run = self._run
        return run is not None and run.steps_left > 0 and self.cache.has_room_to_decode(run.growth)

    def repeat(self) -> ScheduledStep:
        """The step before, a token further, where ``can_repeat`` says so."""
        if self._run is None:
            raise ValueError("there is no step to repeat; ask can_repeat first")
        self.cache.grow_decoding(self._run.growth)
        return self._run.next_step(self._plan)

    def plan_running(self, *, settled: bool) -> StepPlan | None:
        """What those who run already do in the next step, once those who are in their way have been retracted.

        Returns:
            The plan; None as ``next_step``. Nothing has been noted, and no page taken.
        """
        (rows, counts), retractions = self._running_rows(), self.retractions
        while not self.cache.has_room_for(growth := self.cache.plan_growth(rows, counts)):
            if not settled:
                return None
            self._retract(max(self.running, key=lambda request: request.rank))
            rows, counts = self._running_rows()
        # Who was just retracted must not come straight back, or the two would take turns without getting on; but one
        # that runs alone was in its own way, with a copy of pages that are cached, and comes back to share those.
        return StepPlan(rows, counts, growth, may_admit=retractions == self.retractions or not rows.size)

    def has_place(self, plan: StepPlan) -> bool:
        """Whether the step and the batch have room for one more request."""
        return plan.may_admit and len(self.running) < self.max_running_requests and self._budget(plan) > 0

    def admit_first(self, plan: StepPlan) -> bool:
        """Admits the request that is first to a step that has a place; returns whether there is one and room for it."""
        request = self.queue.first()
        if request is None:
            return False
        self.queue.acting_for = request
        admission = self.cache.admit(
            request.scope,
            request.tokens(0, request.num_tokens),
            most_tokens=request.max_tokens,
            priority=request.params.priority,
            counts_hit=request.cached_tokens is None,
        )
        self.queue.acting_for = None
        if admission is None:
            return False
        request.begin(admission.cached_tokens + admission.loaded_tokens)
        if request.cached_tokens is None:
            request.cached_tokens = request.num_computed
        self.waiting.remove(request)
        self._plan.admit(request, admission.row)
        chunk = min(request.num_pending, self._budget(plan))
        plan.admitted.append(admission.row)
        plan.chunks.append(chunk)
        return True

    def schedule(self, plan: StepPlan) -> ScheduledStep:
        """Gives the requests of a plan their pages, and notes that their tokens will be computed."""
        rows, counts, growth = plan.rows, plan.counts, plan.growth
        if plan.admitted:
            rows = np.append(rows, np.array(plan.admitted, np.int32))
            counts = np.append(counts, np.array(plan.chunks, np.int64))
            growth = self.cache.plan_growth(rows, counts)
        self.cache.grow_as_planned(growth)
        step = self._plan.schedule(rows, counts)
        is_second = self._plan.is_current(rows) and rows is self._last_rows and step.on_device.all()
        self._last_rows, self._second, self._run = rows, step if is_second else None, None
        return step

    def commit(self, step: ScheduledStep, tokens: Int32, finished: list[Request]) -> None:
        """Books a step that has run.

        What was computed for a request that has ended or lost its pages since the step was planned is dropped. Where
        the prefix cache fails for a request, that one's pages are not cached: see ``RequestQueue.faults``.

        Args:
            step: one that was planned, and not taken back since.
            tokens: ``tokens[i]`` was sampled for row ``i``, or is negative where none could be; padding may follow.
            finished: the requests that finish are added to it; what they held is free or cached.
        """
        tokens = tokens[: len(step.requests)]
        chosen, is_chosen = tokens.tolist(), tokens >= 0
        all_chosen = bool(is_chosen.all())
        if all_chosen and step.growth is not None and self._plan.is_current(step.req_pool_idx):
            self._plan.append(chosen)
            self._release_ended(step, step.ends, chosen, finished)
            return
        live = self.still_run(step)
        sampled = live & step.samples
        if not all_chosen:
            self._end_unchosen(step, sampled & ~is_chosen, finished)
            live, sampled = self.still_run(step), sampled & is_chosen
        for index in np.flatnonzero(sampled).tolist():
            step.requests[index].output.append(chosen[index])
        for index in np.flatnonzero(live & ~step.on_device).tolist():
            request, samples = step.requests[index], bool(sampled[index])
            request.num_prefilled, request.is_decoding = int(step.starts[index] + step.counts[index]), samples
        for index in np.flatnonzero(live & ~step.is_decode).tolist():
            self._publish(step.requests[index])
        self._release_ended(step, step.ends, chosen, finished, sampled)

    def still_run(self, step: ScheduledStep) -> Bool:
        """Which rows of a step are for requests that have not ended or lost their pages since it was planned."""
        return self._plan.are_live(step.req_pool_idx, step.tenancies)

    def sampled_rows(self, step: ScheduledStep) -> list[tuple[Request, int]]:
        """Whose next token a step that has run has chosen, and in which row of its results, of those who still run."""
        rows = np.flatnonzero(self.still_run(step) & step.samples).tolist()
        return [(step.requests[row], row) for row in rows]

    def check_integrity(self) -> None:
        """Proves that every page is accounted for and that the running requests have the rows; else IntegrityError."""
        self.cache.check_integrity()
        rows, used = sorted(self._plan.in_order().tolist()), self.cache.page_table.rows_in_use().tolist()
        if rows != used:
            raise IntegrityError(f"the rows {used} are in use, and the running requests have {rows}; this is a bug")

    def give_back_rows(self, *, keeps_pages: bool) -> None:
        """Ends every row, see ``QueueFront``; the books are begun anew where they do not balance afterwards."""
        for request in self.running if keeps_pages else ():
            if (row := request.req_pool_idx) is not None:
                with suppress(Exception):  # the check below says whether that was harmless
                    self.cache.release(row, request.scope, request.tokens(0, request.num_computed))
        if not (keeps_pages and self._has_all_back()):
            self.cache.clear()
            self._plan.clear()
        self._last_rows = self._second = self._run = None

    def fork(self, parent: Request, child: Request) -> PageCopy | None:
        """Starts ``child``, another answer to the prompt that ``parent`` has just computed, from the parent's pages.

        The child computes the prompt's last token itself, since it draws from that token's logits.

        Returns:
            The copy of the prompt's partial last page that the device must make; None where none is needed, or where
            there is no room now or the parent has lost its pages: then the child waits like any other request.

        Raises:
            Exception: what saving evicted pages raises; the child has not started then.
        """
        shared = len(parent.prompt) - 1
        row, has_slot = parent.req_pool_idx, len(self.running) < self.max_running_requests
        # A parent that was retracted after its first token may run again and not have computed its prompt yet.
        if row is None or parent.num_computed < shared or not has_slot or not self.cache.can_fork(row, shared):
            self.queue.arrive(child, parent.arrival or 0.0)
            self.queue.wait(child)
            return None
        child_row, sources, targets = self.cache.fork(row, shared)
        self.queue.arrive(child, parent.arrival or 0.0)
        child.replica = parent.replica
        child.begin(shared)
        child.cached_tokens = shared
        self._plan.admit(child, child_row)
        return PageCopy(sources, targets, parent.replica) if sources.size else None

    def end(self, request: Request, reason: FinishReason) -> None:
        """Ends a request wherever it stands and gives back every page it holds; does nothing if it has ended."""
        if request.finish_reason is not None:
            return
        request.finish_reason = reason
        if request.req_pool_idx is None:
            self.waiting.remove(request)
        else:
            self._release(request)

    def _running_rows(self) -> tuple[Int32, Int64]:
        """What those who run already would like to do: decode first, then chunks of prompts in order of rank.

        Returns:
            Rows, and tokens of each.
        """
        rows = self._plan.in_order()
        pending = self._plan.pending(rows)
        if (pending == 1).all():
            return rows, pending
        decode, prompts = rows[pending == 1], rows[pending > 1]
        counts = np.ones(decode.size, np.int64)
        budget = self.max_step_tokens - decode.size
        prompts = prompts[np.lexsort((self._plan.request_id[prompts], self._plan.rank[prompts]))]
        wanted = self._plan.pending(prompts)
        chunks = np.minimum(wanted, budget - (wanted.cumsum() - wanted))
        fits = chunks > 0
        return np.concatenate([decode, prompts[fits]]), np.concatenate([counts, chunks[fits]])

    def _budget(self, plan: StepPlan) -> int:
        """Tokens that a step can feed yet."""
        return self.max_step_tokens - int(plan.counts.sum()) - sum(plan.chunks)

    def _release_ended(
        self,
        step: ScheduledStep,
        may_end: Bool,
        chosen: list[int],
        finished: list[Request],
        sampled: Bool | None = None,
    ) -> None:
        """Releases the requests that the tokens of a step have ended; ``sampled`` tells whose these are, None all."""
        stop_ids = self._plan.stop_ids()
        if not stop_ids.isdisjoint(chosen):
            may_end = may_end | np.isin(chosen, list(stop_ids))
        if sampled is not None:
            may_end = may_end & sampled
        ending = [step.requests[index] for index in may_end.nonzero()[0].tolist()]
        ended = [request for request in ending if request.note_end()]
        finished += ended
        for request in ended:
            self._release(request)

    def _end_unchosen(self, step: ScheduledStep, rows: Bool, finished: list[Request]) -> None:
        """Ends the requests of a step for which no token could be chosen; nothing of them is cached."""
        for index in np.flatnonzero(rows).tolist():
            request = step.requests[index]
            request.note_non_finite()
            finished.append(request)
            self._release(request, keeps_pages=False)

    def _retract(self, request: Request) -> None:
        """Sends a running request back to wait with the tokens it has; what it computed may stay cached."""
        self._release(request)
        request.begin(0)
        self.queue.wait(request)
        request.retractions += 1
        self.retractions += 1

    def _publish(self, request: Request) -> None:
        if request.req_pool_idx is None:
            return
        try:
            self.cache.publish(request.req_pool_idx, request.scope, request.tokens(0, request.num_computed))
        except Exception as error:  # the request gets on without
            self.queue.faults.append(error)

    def _release(self, request: Request, *, keeps_pages: bool = True) -> None:
        # A step that was scheduled and did not run has grown the row by slots that hold nothing yet.
        computed = request.tokens(0, request.num_computed if keeps_pages else 0)
        self._second = self._run = None  # they would keep alive what has ended
        row = self._plan.release(request)
        try:
            self.cache.release(row, request.scope, computed)
        except Exception as error:  # the row has been given back
            self.queue.faults.append(error)

    def _has_all_back(self) -> bool:
        """Whether the books balance with no request running."""
        self._plan.clear()
        try:
            self.check_integrity()
        except Exception as error:  # whatever a fault has made of them
            _logger.error("the books of the cache do not balance after a fault and are begun anew: %s", error)
            return False
        return not self.cache.held_tokens
