"""Recovery of an engine after a step has failed, whatever raised and wherever.

The rule:

1. Every step that was planned and not committed is taken back. All requests wait again with the tokens that they have:
   the requests are the source of truth, and all else is made to agree with them. Books that do not balance are
   cleared, and the pool's buffers are allocated again where the failed step has consumed them.
2. ``LLM.step`` raises the error, and the next step continues. ``LLM.generate`` continues by itself.
3. A request that makes steps fail ``MAX_TRIES`` times without a token in between ends with the reason "error".
   Where several requests are suspected, they are admitted one by one after the second failure, so that the one that
   fails alone is found.
4. ``MAX_FRUITLESS`` failures with no step and no ended request between them end all unfinished requests.
"""

from __future__ import annotations

import logging

from engine.serving.device.runner import ModelRunner
from engine.serving.groups import AnswerGroups
from engine.serving.plan.scheduler import Scheduler
from engine.serving.request import FinishReason, Request, RequestState
from engine.serving.stepper import Stepper
from engine.serving.watch.stats import EngineStats

MAX_TRIES = 3
TRIES_TOGETHER = 2
MAX_FRUITLESS = 10

_logger = logging.getLogger(__name__)


class Recovery:
    """Brings an engine back to a state in which it can continue.

    Args:
        scheduler: its rows are given back.
        stepper: its steps under way are dropped.
        runner: its pool may be lost.
        groups: the requests.
        stats: shows whether steps make progress.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        stepper: Stepper,
        runner: ModelRunner,
        groups: AnswerGroups,
        stats: EngineStats,
    ) -> None:
        self._scheduler = scheduler
        self._stepper = stepper
        self._runner = runner
        self._groups = groups
        self._stats = stats
        self._fruitless = 0  # failures in a row
        self._steps = 0  # that had run at the last of them

    def after(self, error: BaseException) -> None:
        """Recovers from whatever was raised in the middle of a change."""
        members = self._groups.members()
        running = [request for request in members if request.state is RequestState.RUNNING]
        culprit = self._scheduler.queue.culprit(running)
        self._stepper.drop()
        self._scheduler.restart(members, keeps_pages=self._has_pages())
        self._groups.restart()
        if isinstance(error, Exception):  # no request causes an interrupt
            self._blame(culprit, running, error)

    def blame(self, request: Request, error: Exception) -> bool:
        """Counts a failure that a request caused; returns whether the request was ended for it."""
        tries = request.note_failure()
        _logger.error("request %d: failure %d of %d on its account: %r", request.request_id, tries, MAX_TRIES, error)
        return tries >= MAX_TRIES

    def check_books(self, fault: Exception) -> None:
        """After the prefix cache has failed for a request: clears the books where that has left them unbalanced."""
        try:
            self._scheduler.check_integrity()
        except Exception:
            self.after(fault)

    def _has_pages(self) -> bool:
        try:
            return self._runner.recover()
        except Exception as error:  # the next steps fail for want of a pool, until all requests have ended
            _logger.error("no new pool could be made in place of the lost one: %r", error)
            return False

    def _blame(self, culprit: Request | None, running: list[Request], error: Exception) -> None:
        self._fruitless = 1 if self._stats.steps != self._steps else self._fruitless + 1
        self._steps = self._stats.steps
        if self._fruitless > MAX_FRUITLESS:
            _logger.error("%d steps failed in a row; every request is ended: %r", self._fruitless, error)
            self._give_up(self._groups.members(), error)
        elif culprit is not None:
            if self.blame(culprit, error):
                self._give_up([culprit], error)
        else:
            _logger.error("a step of %d requests failed and is run again: %r", len(running), error)
            if running and self._fruitless >= TRIES_TOGETHER:
                self._scheduler.queue.suspect(running)

    def _give_up(self, requests: list[Request], error: Exception) -> None:
        for request in requests:
            if request.state is not RequestState.ENDED:
                self._scheduler.end(request, FinishReason.ERROR, f"{type(error).__name__}: {error}")
                self._groups.ended.append(request)
        self._fruitless = 0
