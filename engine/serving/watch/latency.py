"""How long requests wait, compute and generate: measured as it happens, kept as histograms.

A moment is that of the step in which something happens: a token comes when its step is committed. The clock is this
process's own, and no plan depends on it. The names of the histograms are those under which they are exported, and
vLLM's where it has them; so are the bounds, with smaller ones before them for small models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from engine.memory.integers import Bool, Int64
from engine.serving.plan.replica import Replica
from engine.serving.plan.step import ReplicaStep, ScheduledStep
from engine.serving.plan.token_times import TokenTimes
from engine.serving.request import FinishReason, Request, RequestState
from engine.serving.watch.histogram import Histogram, HistogramSnapshot

FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_SECONDS = (
    *(0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
REQUEST_TOKENS = tuple(digit * 10**zeros for zeros in range(6) for digit in (1, 2, 5))

COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True)
class LatencyMetrics:
    """Distributions since the engine was made; each of the ``n`` answers to a prompt counts as a request.

    A retraction is part of whatever it falls into. What measures a whole answer counts answers that are complete: they
    ended by a token or by their length.

    Attributes:
        time_to_first_token_seconds: from a request's arrival to its first token.
        inter_token_latency_seconds: from a token to the next of the same request.
        e2e_request_latency_seconds: from arrival to the last token, of complete answers.
        request_queue_time_seconds: from arrival until it first had pages; not of a sibling that starts from the pages
            of its prompt, since it was not queued.
        request_prefill_time_seconds: from the first pages to the first token, of complete answers.
        request_decode_time_seconds: from the first token to the last, of complete answers.
        request_time_per_output_token_seconds: the mean time between the tokens of a complete answer with two or more.
        request_prompt_tokens: tokens of the prompt, of complete answers.
        request_generation_tokens: tokens of a complete answer.
        iteration_tokens_total: tokens fed by a step.
        step_time_seconds: a step's time, as in ``EngineStats.prefill_seconds``.
    """

    time_to_first_token_seconds: HistogramSnapshot
    inter_token_latency_seconds: HistogramSnapshot
    e2e_request_latency_seconds: HistogramSnapshot
    request_queue_time_seconds: HistogramSnapshot
    request_prefill_time_seconds: HistogramSnapshot
    request_decode_time_seconds: HistogramSnapshot
    request_time_per_output_token_seconds: HistogramSnapshot
    request_prompt_tokens: HistogramSnapshot
    request_generation_tokens: HistogramSnapshot
    iteration_tokens_total: HistogramSnapshot
    step_time_seconds: HistogramSnapshot


class Latencies:
    """Keeps the histograms of ``LatencyMetrics``. Every ``now`` is in seconds, of one monotonic clock."""

    def __init__(self) -> None:
        self.time_to_first_token_seconds = Histogram(FIRST_TOKEN_SECONDS)
        self.inter_token_latency_seconds = Histogram(TOKEN_SECONDS)
        self.e2e_request_latency_seconds = Histogram(REQUEST_SECONDS)
        self.request_queue_time_seconds = Histogram(REQUEST_SECONDS)
        self.request_prefill_time_seconds = Histogram(REQUEST_SECONDS)
        self.request_decode_time_seconds = Histogram(REQUEST_SECONDS)
        self.request_time_per_output_token_seconds = Histogram(TOKEN_SECONDS)
        self.request_prompt_tokens = Histogram(REQUEST_TOKENS)
        self.request_generation_tokens = Histogram(REQUEST_TOKENS)
        self.iteration_tokens_total = Histogram(STEP_TOKENS)
        self.step_time_seconds = Histogram(STEP_SECONDS)

    def snapshot(self) -> LatencyMetrics:
        """The histograms as they are now."""
        return LatencyMetrics(**{each.name: getattr(self, each.name).snapshot() for each in fields(LatencyMetrics)})

    def note_arrival(self, requests: Iterable[Request], now: float) -> None:
        """Notes when requests arrived, unless somebody has noted that they did earlier."""
        for request in requests:
            if math.isnan(request.times.arrived):
                request.times.arrived = now

    def note_admitted(self, requests: Iterable[Request], now: float) -> None:
        """Notes that requests have been admitted; only the first time counts."""
        for request in requests:
            if math.isnan(request.times.admitted):
                request.times.admitted = now
                self.request_queue_time_seconds.observe(now - request.times.arrived)

    def note_fork(self, sibling: Request, now: float) -> None:
        """Notes that a sibling has started, if it got pages from its prompt's and need not be admitted."""
        if sibling.state is RequestState.RUNNING:
            sibling.times.admitted = now

    def note_step(
        self,
        replicas: Sequence[Replica],
        step: ScheduledStep,
        gained: Sequence[Bool | None],
        ended: Iterable[Request],
        now: float,
    ) -> None:
        """Notes the tokens of a step that was committed at ``now``.

        Args:
            replicas: those that ran it.
            step: the step.
            gained: what ``Replica.commit`` has returned for each replica.
            ended: the requests that it has ended.
            now: when its tokens were read.
        """
        for replica, part, rows in zip(replicas, step.parts, gained, strict=True):
            if rows is None:
                gap = replica.token_times.note_repeat(part.req_pool_idx, now)
                self.inter_token_latency_seconds.observe(gap, len(part.requests))
            else:
                self._note_tokens(replica.token_times, part, rows.nonzero()[0], now)
        for request in ended:
            request.times.ended = now

    def note_answer(self, request: Request, now: float) -> None:
        """Counts an answer that is complete; others are not counted."""
        if request.finish_reason not in COMPLETE:
            return
        times, tokens = request.times, len(request.output)
        if math.isnan(times.ended):  # a fault came between its end and the note of it
            times.ended = now
        self.e2e_request_latency_seconds.observe(times.ended - times.arrived)
        self.request_prefill_time_seconds.observe(times.first_token - times.admitted)
        self.request_decode_time_seconds.observe(times.ended - times.first_token)
        if tokens > 1:
            self.request_time_per_output_token_seconds.observe((times.ended - times.first_token) / (tokens - 1))
        self.request_prompt_tokens.observe(len(request.prompt))
        self.request_generation_tokens.observe(tokens)

    def _note_tokens(self, token_times: TokenTimes, part: ReplicaStep, gained: Int64, now: float) -> None:
        """Notes the tokens of the requests ``gained`` of a step: first ones, and such as follow others."""
        gaps = token_times.note(part.req_pool_idx[gained], now)
        is_first = np.isnan(gaps)
        self.inter_token_latency_seconds.observe_all(gaps[~is_first])
        for index in gained[is_first].tolist():
            times = part.requests[index].times
            times.first_token = now
            self.time_to_first_token_seconds.observe(now - times.arrived)
