"""What an engine has done, counted where it is done."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.serving.plan.step import ScheduledStep
from engine.serving.request import FinishReason, Request
from engine.serving.watch.latency import Latencies


@dataclass
class EngineStats:
    """Running totals.

    The seconds of a step that prefills and decodes are divided between both in proportion to their tokens.

    Attributes:
        steps: steps run.
        prefill_tokens: tokens fed by prefill.
        decode_tokens: tokens fed by decode.
        prefill_seconds: time of the steps' prefill; a step takes from its dispatch, or from the commit of the step
            before it if that was later, to its own commit.
        decode_seconds: time of the steps' decode.
        peak_held_tokens: most token slots in held pages after any step.
        finished: number of answers by finish reason.
        latency: how long requests and steps took.
        clock: seconds; every time that is counted here is measured with it.
    """

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_held_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    latency: Latencies = field(default_factory=Latencies)
    clock: Callable[[], float] = time.perf_counter

    def note(self, step: ScheduledStep, seconds: float, held_tokens: int) -> None:
        """Counts a step that took ``seconds``; ``held_tokens`` are the slots in held pages after it."""
        total, decode = step.num_tokens, step.num_decode_tokens
        self.steps += 1
        self.decode_tokens += decode
        self.prefill_tokens += total - decode
        self.decode_seconds += seconds * decode / total
        self.prefill_seconds += seconds * (total - decode) / total
        self.peak_held_tokens = max(self.peak_held_tokens, held_tokens)
        self.latency.iteration_tokens_total.observe(total)
        self.latency.step_time_seconds.observe(seconds)

    def note_answers(self, requests: Iterable[Request]) -> None:
        """Counts answers that have been handed out, or that their caller has given up."""
        now = self.clock()
        for request in requests:
            self.finished[request.finish_reason or FinishReason.ABORT] += 1
            self.latency.note_answer(request, now)
