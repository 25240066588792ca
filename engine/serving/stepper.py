"""The engine's loop: plans a step while the device runs the one before it.

    plan n+1 │ fill │ dispatch n+1 │ wait for n │ read n │ commit n │ plan n+2 …
    device:   ……… step n ……………………………………┤├…… step n+1 ……………………………………………

Programs run on the device in the order of dispatch. So when a page is freed at the commit of one step
and taken for the next but one, that later program writes it after the step under way has finished its writes there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import jax
import numpy as np
import numpy.typing as npt

from engine.kv.page_copy import PageData
from engine.memory.integers import Int32
from engine.serving.device.batcher import Batcher
from engine.serving.device.page_mover import PageMover
from engine.serving.device.runner import ModelRunner, StepResult
from engine.serving.device.sampler import Sampled
from engine.serving.plan.scheduler import Scheduler
from engine.serving.plan.step import ScheduledStep
from engine.serving.request import Request, TokenLogprobs
from engine.serving.watch.stats import EngineStats


@dataclass(frozen=True, eq=False)
class Flight:
    """A step that was dispatched and is not committed."""

    step: ScheduledStep
    result: StepResult
    dispatched: float
    logits: jax.Array | None
    keeps_logprobs: bool
    saves: int  # number of page saves started before this step's dispatch


class Stepper:
    """Plans, dispatches and commits steps.

    Args:
        scheduler: decides which requests run.
        batcher: makes parcels.
        runner: runs them.
        mover: moves pages before them.
        stats: counts them.
        overlap: whether a step is dispatched before the one before it is committed.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        batcher: Batcher,
        runner: ModelRunner,
        mover: PageMover,
        stats: EngineStats,
        *,
        overlap: bool,
    ) -> None:
        self._scheduler = scheduler
        self._batcher = batcher
        self._runner = runner
        self._mover = mover
        self._stats = stats
        self._most_flights = 1 if overlap else 0
        self._flights: deque[Flight] = deque()
        self._landed = 0.0  # when the last step was committed

    def advance(self, finished: list[Request], *, return_logits: bool = False) -> None:
        """Dispatches the next step and commits the one before it, or the next itself where steps do not overlap.

        Where it raises, every step under way is to be taken back: see ``Recovery``.

        Args:
            finished: the requests that finish are added to it.
            return_logits: keep the logits of the step that is dispatched.
        """
        while (step := self._scheduler.next_step(settled=not self._flights)) is None:
            self._land(finished)
        if step.admitted:
            self._stats.latency.note_admitted(step.admitted, self._stats.clock())
        if step.moves:
            self._mover.make(step.moves)
        self._runner.enter_rows(self._batcher.entries(step))
        has_requests = step.num_tokens > 0
        if has_requests:
            self._flights.append(self._dispatch(step, keeps_logits=return_logits))
        if self._flights and (not has_requests or len(self._flights) > self._most_flights):
            self._land(finished)
        if not self._scheduler.has_work:
            self.finish()

    def finish(self) -> None:
        """Forgets the steps under way, when there is no request left whose tokens they compute; saved pages land."""
        self._flights.clear()
        self._mover.land()

    def drop(self) -> None:
        """Forgets the steps under way and the pages on their way to the host, when all requests start again."""
        self._flights.clear()
        self._mover.forget()

    def land_saves(self) -> None:
        """Waits until the pages on their way to the host tier are there."""
        self._mover.land()

    def forget_saves(self) -> None:
        """Drops the pages on their way to the host tier, when all cached prefixes are forgotten."""
        self._mover.forget()

    def read_pages(self, replica: int, pages: Int32) -> PageData:
        """Copies pages of a replica's pool to the host."""
        return self._runner.start_reading(pages, replica=replica).wait()

    def _dispatch(self, step: ScheduledStep, *, keeps_logits: bool) -> Flight:
        parcel, shape, earlier_updates = self._batcher.fill(step)
        result = self._runner.step(parcel, shape, earlier_updates, self._batcher.adjusts(step))
        logits = self._runner.to_read(result.logits) if keeps_logits else None
        return Flight(step, result, self._stats.clock(), logits, bool(parcel.wants_logprobs[0]), self._mover.started)

    def _land(self, finished: list[Request]) -> None:
        """Waits for the oldest step and commits it; adds the requests that finish."""
        flight = self._flights[0]
        step, result = flight.step, flight.result
        tokens = np.asarray(result.tokens)
        logits = None if flight.logits is None else np.asarray(flight.logits)
        sampled: Sampled | None = jax.device_get(result.sampled) if flight.keeps_logprobs else None
        if logits is not None or sampled is not None:
            for request, index in self._scheduler.sampled_rows(step):
                if tokens[index] >= 0:
                    _keep(request, index, logits, sampled)
        now, held_tokens, before = self._stats.clock(), self._scheduler.held_tokens, len(finished)
        gained = self._scheduler.commit(step, tokens, finished)
        self._flights.popleft()
        self._stats.note(step, now - max(flight.dispatched, self._landed), held_tokens)
        self._stats.latency.note_step(self._scheduler.replicas, step, gained, finished[before:], now)
        self._landed = now
        self._mover.land(flight.saves)


def _keep(request: Request, index: int, logits: npt.NDArray[np.float32] | None, sampled: Sampled | None) -> None:
    """Keeps what a caller has requested in addition to the token of row ``index``."""
    if logits is not None:
        request.logits.append(logits[index])
    wanted = request.params.logprobs
    if sampled is not None and wanted is not None:
        ids, values = sampled.top_ids[index, :wanted].tolist(), sampled.top_logprobs[index, :wanted].tolist()
        request.logprobs.append(TokenLogprobs(float(sampled.logprob[index]), tuple(zip(ids, values, strict=True))))
