"""One replica's running requests: its rows, its share of each step, and what becomes of a step that has run.

What is *planned* runs ahead of what is *computed*: a step is planned while the one before it runs, when the tokens that
it samples are not known yet. The tokens themselves are in ``Request``; the row table says how many are granted and
computed, and ``planned`` here how many there will be.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from engine.errors import IntegrityError, RequestTooLarge
from engine.memory.integers import Bool, Int32, Int64
from engine.memory.manager import CacheManager
from engine.serving.plan.prefix_waits import PrefixWaits
from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.step import ReplicaStep, SamplingColumns, StepPlan
from engine.serving.plan.token_times import TokenTimes
from engine.serving.request import NEVER, Request, RequestState
from engine.trace.recorder import Recorder

NO_TOKENS = np.empty(0, np.int32)

_logger = logging.getLogger(__name__)


class Replica:
    """Continuous batching over a fixed number of rows.

    Args:
        cache: owns pages and rows.
        queue: where requests wait; replicas share one.
        max_running_requests: most requests that run at once.
        max_step_tokens: most new tokens in a step; at least ``max_running_requests``, so that each request can decode.
        index: which of the replicas this is.
        pool_name: name of the pool in messages.
        recorder: is told which request has which row; None where nothing is recorded.

    Attributes:
        running: the requests that have a row, in order of admission.
        planned: int64 ``[rows]`` tokens of each row's request, including those that steps under way will sample.
        retractions: how often a request was retracted.
        token_times: when each row's request got its last token.
    """

    def __init__(
        self,
        cache: CacheManager,
        queue: RequestQueue,
        *,
        max_running_requests: int,
        max_step_tokens: int,
        index: int = 0,
        pool_name: str = "the pool",
        recorder: Recorder | None = None,
    ) -> None:
        self.cache = cache
        self.max_running_requests = max_running_requests
        self.max_step_tokens = max(max_step_tokens, max_running_requests)
        self.index = index
        self.retractions = 0
        self.running: list[Request] = []
        rows = cache.page_table.max_requests
        self.planned = np.zeros(rows, np.int64)
        self.token_times = TokenTimes(rows)
        self._queue = queue
        self._pool_name = pool_name
        self._recorder = recorder
        self._sampling = SamplingColumns.of_rows(rows)
        self._requests: list[Request | None] = [None] * rows  # by row
        self._entered: dict[int, Request] = {}  # by row: those that adjust their logits, until a step tells the device
        self._ordered_at = -1  # the membership at which the next five were made, all in order of admission
        self._order, self._in_order, self._outputs = NO_TOKENS, tuple[Request, ...](), list[list[int]]()
        self._stop_ids: frozenset[int] = frozenset()
        self._has_texts = False  # whether a stop text may end one of them
        self._reads_text = np.zeros(rows, np.bool_)  # which rows' requests it may end
        self._last: ReplicaStep | None = None  # of all running requests, each decoding
        self._repeats = 0  # how many steps may follow it, each a token further, until a request changes how it runs
        self._unmarked: ReplicaStep | None = (
            None  # the last of them that has run: its tokens are not marked computed yet
        )
        self._waits = PrefixWaits(cache, queue)

    @property
    def planned_tokens(self) -> int:
        """Tokens of the running requests, those included that steps under way will sample."""
        return int(self.planned[self._rows()].sum())

    def check_fits(self, request: Request) -> None:
        """Refuses a request that could never run.

        Raises:
            RequestTooLarge: the whole pool is smaller than what the request may need.
        """
        demand, size = self.cache.demand, self.cache.size
        needed = demand.most_pages(request.max_tokens) * demand.page_size
        if needed > size:
            fitting = demand.most_tokens(size // demand.page_size, request.max_tokens)
            most = fitting + 1 - len(request.prompt)
            advice = f"lower max_new_tokens to {most}" if most >= 1 else "shorten the prompt"
            pages = "" if len(demand.windows) == 1 else f" ({demand.describe(request.max_tokens)})"
            raise RequestTooLarge(
                f"request of {len(request.prompt)} prompt and up to {request.params.max_new_tokens} new tokens can "
                f"never fit: it needs {needed} tokens of KV in whole pages{pages}, {self._pool_name} has {size};"
                f" {advice} or raise max_total_tokens",
                requested=needed,
                available=size,
            )

    # How a step is planned.

    def plan_running(self, *, settled: bool) -> StepPlan | None:
        """What the running requests do in the next step, after as many retractions as they need.

        Returns:
            The plan; None if the pool is short and a step is under way (``settled`` is False): commit that first. No
            page has been taken.
        """
        if self._repeats and self._last is not None and self._last.membership == self.cache.page_table.membership:
            plan = StepPlan(self._last.req_pool_idx, self._last.counts, is_all=True, repeats=True)
        else:
            self._waits.end_waits()
            plan = self._next_rows()
        retractions = self.retractions
        while not self.cache.has_room_to_grow(plan.rows, 1 if plan.repeats else plan.counts):
            if not settled:
                return None
            self._retract(max(self.running, key=lambda request: request.rank))
            plan = self._next_rows()
        # A request that was just retracted must not be admitted at once, or two would take turns without progress. But
        # one that ran alone held a copy of pages that are cached, and is admitted again to share those.
        plan.may_admit = retractions == self.retractions or not plan.rows.size
        return plan

    def has_place(self, plan: StepPlan) -> bool:
        """Whether the step and the batch have room for one more request."""
        return plan.may_admit and len(self.running) < self.max_running_requests and self._budget(plan) > 0

    def admit(self, request: Request, plan: StepPlan) -> bool:
        """Admits a waiting request to a step that has a place; returns whether there is room for it.

        It waits with its row, and is in no step yet, where another request is computing what both begin with.
        """
        table, tokens = self.cache.page_table, request.tokens(0, request.num_tokens)
        is_new = request.cached_tokens is None
        admission = self.cache.admit(
            request.scope,
            tokens,
            most_tokens=request.max_tokens,
            priority=request.params.priority,
            counts_hit=is_new,
        )
        if admission is None:
            return False
        row, granted = admission.row, table.kv_len(admission.row)
        if is_new:
            request.cached_tokens = granted
        self._queue.waiting.remove(request)
        self._enter(request, row)
        if admission.loaded_tokens:  # whose pages the cache does not have yet
            self._waits.compute(request.scope, row, tokens, granted)
        elif self._waits.enter(request, row, granted, counts_hit=is_new):
            return True
        plan.admitted.append(row)
        plan.chunks.append(min(tokens.size - granted, self._budget(plan)))
        return True

    def shared_tokens(self, request: Request) -> int:
        """Tokens of a waiting request that need not be computed here: cached ones, or ones that another computes."""
        tokens = request.tokens(0, request.num_tokens)
        cached = self.cache.cached_tokens(request.scope, tokens)
        return max(cached, self._waits.find(request.scope, tokens, cached)[1])

    def schedule(self, plan: StepPlan) -> ReplicaStep:
        """Gives the requests of a plan their pages, and notes that their tokens will be computed."""
        table, last = self.cache.page_table, self._last
        rows, counts = plan.rows, plan.counts
        if plan.repeats and last is not None and last.membership == table.membership:
            return self._repeat(last)
        if plan.admitted:
            rows = np.append(rows, np.array(plan.admitted, np.int32))
            counts = np.append(counts, np.array(plan.chunks, np.int64))
        starts, known, most = table.request_lens(rows)
        self.cache.grow(rows, counts)
        position = starts + counts
        samples = position == self.planned[rows]
        self.planned[rows] += samples
        sampling, on_device = self._sampling.at(rows), starts >= known
        adjusts = samples & (position < sampling.adjusts_until)
        is_all = plan.is_all and rows.size == len(self.running) and self._ordered_at == table.membership
        step = ReplicaStep(
            requests=self._in_order if is_all else [self._request_of(row) for row in rows.tolist()],
            req_pool_idx=rows,
            starts=starts,
            counts=counts,
            on_device=on_device,
            samples=samples,
            ends=samples & (self.planned[rows] > most),  # the last token of an answer is never fed
            generations=table.generations(rows),
            sampling=sampling,
            new_pages=table.take_new_pages(rows),
            num_tokens=int(counts.sum()),
            num_decode_tokens=int(counts[on_device].sum()),
            membership=table.membership if is_all else None,
            adjusts=adjusts if adjusts.any() else None,
            entered=self._take_entered(),
        )
        self._last = step if rows.size and is_all and on_device.all() and samples.all() else None
        self._repeats = int((_alike_until(step, most) - self.planned[rows]).min()) if self._last else 0
        return step

    def _repeat(self, last: ReplicaStep) -> ReplicaStep:
        """The step before, a token further, of requests that all decode while none comes or goes."""
        rows, table = last.req_pool_idx, self.cache.page_table
        self.cache.grow(rows, 1)
        self._repeats -= 1
        self.planned[rows] += 1
        ends = last.ends if self._repeats else self.planned[rows] > table.request_lens(rows).most
        self._last = step = last.further(ends, table.take_new_pages(rows))
        return step

    # What becomes of a step.

    def commit(self, step: ReplicaStep, tokens: Int32, finished: list[Request]) -> Bool | None:
        """Books a step that has run.

        What was computed for a request that has ended or lost its pages since the step was planned is dropped. Where
        the prefix cache fails for a request, that one's pages are not cached: see ``RequestQueue.faults``.

        Args:
            step: one that was planned, and not taken back since.
            tokens: ``tokens[i]`` was sampled for row ``i``, or is negative where none could be; padding may follow.
            finished: the requests that finish are added to it; what they held is free or cached.

        Returns:
            Which of the step's requests have got a token; None where all have, and all had one in the step before.
        """
        tokens = tokens[: len(step.requests)]
        chosen, is_chosen, rows, table = tokens.tolist(), tokens >= 0, step.req_pool_idx, self.cache.page_table
        all_chosen = bool(is_chosen.all())
        if all_chosen and step.repeats and step.membership == table.membership == self._ordered_at:
            self._unmarked = step  # one mark serves all steps of the run
            deque(map(list.append, self._outputs, chosen), maxlen=0)  # a loop in C: this is done at every step
            if table.has_windows:
                self._mark_run()
                self.cache.leave_behind(rows)
            self._release_ended(step, step.ends, chosen, finished)
            return None
        self._mark_run()
        live = self._still_run(step)
        self.cache.mark_computed(rows[live], (step.starts + step.counts)[live])
        sampled = live & step.samples
        if not all_chosen:
            self._end_unchosen(step, sampled & ~is_chosen, finished)
            live, sampled = self._still_run(step), sampled & is_chosen
        for index in sampled.nonzero()[0].tolist():
            step.requests[index].output.append(chosen[index])
        for index in (live & ~step.on_device).nonzero()[0].tolist():
            self._publish(step.requests[index])
        self.cache.leave_behind(rows[live])  # only now that they are published
        self._release_ended(step, step.ends, chosen, finished, sampled)
        return sampled

    def sampled_rows(self, step: ReplicaStep) -> list[tuple[Request, int]]:
        """The running requests whose next token a step that has run has chosen, each with its row of the results."""
        rows = (self._still_run(step) & step.samples).nonzero()[0].tolist()
        return [(step.requests[row], row) for row in rows]

    def fork(self, parent: Request, child: Request) -> bool:
        """Starts ``child``, another answer to the prompt that ``parent`` has just computed, from the parent's pages.

        The child computes the prompt's last token itself, since it draws from that token's logits.

        Returns:
            Whether it has started: not where there is no room now or the parent has lost its pages.
        """
        shared, row = len(parent.prompt) - 1, parent.req_pool_idx
        # A parent that was retracted after its first token may run again and not have computed its prompt yet.
        has_row = len(self.running) < self.max_running_requests
        self._mark_run()
        if row is None or not has_row or not self.cache.can_fork(row, shared):
            return False
        child_row = self.cache.fork(row, shared)
        child.cached_tokens, child.replica = shared, self.index
        self._enter(child, child_row)
        return True

    def release(self, request: Request, *, keeps_pages: bool = True) -> None:
        """Takes a running request's row back; full pages that it has computed may stay cached."""
        row = request.req_pool_idx
        if row is None:
            raise ValueError(f"request {request.request_id} has no row")
        self._mark_run()
        tokens = request.tokens(0, request.num_tokens) if keeps_pages else NO_TOKENS
        request.req_pool_idx = None
        self.running.remove(request)
        self._forget_row(row)
        if self._recorder is not None and request.state is RequestState.ENDED:
            self._recorder.note_request("end", self.index, request.request_id, request.finish_reason)
        try:
            self.cache.release(row, request.scope, tokens)
        except Exception as error:  # the row has been given back
            self._queue.faults.append(error)

    def give_back_rows(self, *, keeps_pages: bool) -> None:
        """Ends every row, in any state of the books after a fault; clears the books if they do not balance."""
        with suppress(Exception):
            self._mark_run()
        self._unmarked = None
        for request in self.running:
            if (row := request.req_pool_idx) is not None:
                self.token_times.leave(row, request.times)
        for request in self.running if keeps_pages else ():
            if (row := request.req_pool_idx) is not None:
                with suppress(Exception):  # the check below says whether that was harmless
                    self.cache.release(row, request.scope, request.tokens(0, request.num_tokens))
        self.running.clear()
        for row in range(len(self._requests)):
            self._forget_row(row)
        self._ordered_at = -1
        if not (keeps_pages and self._has_all_back()):
            self.cache.clear()
        self.cache.take_moves()  # for steps that will not run

    def check_integrity(self) -> None:
        """Proves that every page is accounted for and that the running requests have the rows; else IntegrityError."""
        self.cache.check_integrity()
        rows = sorted(request.req_pool_idx for request in self.running if request.req_pool_idx is not None)
        used = self.cache.page_table.rows_in_use().tolist()
        if rows != used:
            raise IntegrityError(f"the rows {used} are in use, and the running requests have {rows}; this is a bug")

    def _mark_run(self) -> None:
        """Marks as computed what steps that repeated one another have computed: before any row comes or goes."""
        step = self._unmarked
        if step is not None:
            self.cache.mark_computed(step.req_pool_idx, step.starts + 1)
            self._unmarked = None

    def _enter(self, request: Request, row: int) -> None:
        """Begins to plan for a request that has got ``row``."""
        self.planned[row] = request.num_tokens
        self.token_times.enter(row, request.times)
        self._sampling.enter(row, request)
        self._reads_text[row] = request.text is not None
        self._requests[row] = request
        if request.num_tokens < self._sampling.adjusts_until[row]:
            self._entered[row] = request
        request.run(row)
        self.running.append(request)
        if self._recorder is not None:
            self._recorder.note_run(self.index, request.request_id, row, request.scope)

    def _take_entered(self) -> Sequence[Request]:
        """The requests that adjust their logits and got their row since this was last called."""
        if not self._entered:
            return ()
        entered, self._entered = list(self._entered.values()), {}
        return entered

    def _forget_row(self, row: int) -> None:
        self._requests[row] = None
        self._entered.pop(row, None)
        self._waits.forget(row)
        # They would keep requests alive that have ended, which may hold much memory.
        self._last, self._repeats, self._in_order, self._outputs, self._ordered_at = None, 0, (), [], -1

    def _request_of(self, row: int) -> Request:
        request = self._requests[row]
        if request is None:
            raise IntegrityError(f"row {row} is to run and no request has it; this is a bug, report it")
        return request

    def _rows(self) -> Int32:
        """The rows of the running requests in order of admission, int32; made anew when one has come or gone."""
        membership = self.cache.page_table.membership
        if self._ordered_at != membership:
            self._order = np.array([request.req_pool_idx for request in self.running], np.int32)
            self._in_order = tuple(self.running)
            self._outputs = [request.output for request in self.running]
            self._stop_ids = frozenset[int]().union(*{request.stop_ids for request in self.running})
            self._has_texts = bool(self._reads_text[self._order].any())
            self._ordered_at = membership
        return self._order

    def _next_rows(self) -> StepPlan:
        """What the running requests would like to do: decode first, then chunks of prompts in order of rank."""
        rows = self._rows()
        pending = self._pending(rows)
        if (pending == 1).all():
            return StepPlan(rows, pending, is_all=True)
        decode, prompts = rows[pending == 1], rows[pending > 1]
        budget = self.max_step_tokens - decode.size
        prompts = np.array(sorted(prompts.tolist(), key=lambda row: self._request_of(row).rank), np.int32)
        wanted = self._pending(prompts)
        chunks = np.minimum(wanted, budget - (wanted.cumsum() - wanted))
        fits = chunks > 0
        counts = np.concatenate([np.ones(decode.size, np.int64), chunks[fits]])
        return StepPlan(np.concatenate([decode, prompts[fits]]), counts)

    def _pending(self, rows: Int32) -> Int64:
        """Tokens to feed: 1 while decoding, more while prefilling, 0 where only the end, or another row, is awaited."""
        granted, _, most = self.cache.page_table.request_lens(rows)
        pending = np.minimum(self.planned[rows], most) - granted
        if waiting := self._waits.rows:
            pending[np.isin(rows, waiting)] = 0
        return pending

    def _budget(self, plan: StepPlan) -> int:
        """Tokens that a step can still feed."""
        return self.max_step_tokens - int(plan.counts.sum()) - sum(plan.chunks)

    # How requests end.

    def _still_run(self, step: ReplicaStep) -> Bool:
        """Which rows of a step are for requests that have not ended or lost their pages since it was planned."""
        live: Bool = self.cache.page_table.generations(step.req_pool_idx) == step.generations
        return live

    def _release_ended(
        self,
        step: ReplicaStep,
        may_end: Bool,
        chosen: list[int],
        finished: list[Request],
        sampled: Bool | None = None,
    ) -> None:
        """Releases the requests that the tokens of a step have ended; ``sampled`` marks requests, None all."""
        self._rows()
        if not self._stop_ids.isdisjoint(chosen):
            may_end = may_end | np.isin(chosen, list(self._stop_ids))
        if self._has_texts:
            may_end = may_end | self._reads_text[step.req_pool_idx]
        if sampled is not None:
            may_end = may_end & sampled
        ending = [step.requests[index] for index in may_end.nonzero()[0].tolist()]
        ended = [request for request in ending if self._note_end(request)]
        finished += ended
        for request in ended:
            self.release(request)

    def _note_end(self, request: Request) -> bool:
        """Whether a request that has got a token ends; takes the token back where its text cannot be had."""
        self._queue.acting_for = request
        try:
            has_ended = request.note_end()
        except Exception:
            request.take_back_token()
            raise
        self._queue.acting_for = None
        return has_ended

    def _end_unchosen(self, step: ReplicaStep, rows: Bool, finished: list[Request]) -> None:
        """Ends the requests of a step for which no token could be chosen; nothing of them is cached."""
        for index in rows.nonzero()[0].tolist():
            request = step.requests[index]
            request.note_non_finite()
            finished.append(request)
            self.release(request, keeps_pages=False)

    def _retract(self, request: Request) -> None:
        """Sends a running request back to wait with the tokens it has; what it computed may stay cached."""
        if (row := request.req_pool_idx) is not None:
            self.token_times.leave(row, request.times)
        if self._recorder is not None:
            self._recorder.note_request("retract", self.index, request.request_id)
        self.release(request)
        self._queue.wait(request)
        request.retractions += 1
        self.retractions += 1

    def _publish(self, request: Request) -> None:
        row = request.req_pool_idx
        if row is None:
            return
        try:
            self.cache.publish(row, request.scope, request.tokens(0, request.num_tokens))
        except Exception as error:  # the request continues without it
            self._queue.faults.append(error)
        if request.output:  # its prompt is computed
            self._waits.has_computed(row)

    def _has_all_back(self) -> bool:
        """Whether the books balance with no request running."""
        try:
            self.check_integrity()
        except Exception as error:  # in any state after a fault
            _logger.error("the books of the cache do not balance after a fault and are cleared: %s", error)
            return False
        return not self.cache.held_tokens


def _alike_until(step: ReplicaStep, most: Int64) -> Int64:
    """The position of each row's first token that is not chosen as in ``step``: the answer ends, or adjusts no more."""
    if step.adjusts is None:
        return most + 1
    return np.minimum(most + 1, np.where(step.adjusts, step.sampling.adjusts_until, NEVER))
