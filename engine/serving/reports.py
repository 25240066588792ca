"""Keeps finished answers until the call that waits for them takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from engine.errors import Interrupted
from engine.serving.deltas import Deltas, StepOutput, TextOf
from engine.serving.groups import AnswerGroups, group_of
from engine.serving.recovery import Recovery
from engine.serving.request import FinishReason, Request, RequestOutput
from engine.serving.watch.stats import EngineStats


class Reports:
    """Makes the answers of complete groups, and keeps each for the call that waits for it.

    Args:
        groups: the groups of requests.
        recovery: handles an answer that cannot be made.
        stats: counts the answers.
        text_of: returns a request's answer as text.
        begin: makes a StepOutput without an answer.
        deltas: follows the requests of the caller of step.
    """

    def __init__(
        self,
        groups: AnswerGroups,
        recovery: Recovery,
        stats: EngineStats,
        text_of: TextOf,
        begin: Callable[[], StepOutput],
        deltas: Deltas,
    ) -> None:
        self._groups = groups
        self._recovery = recovery
        self._stats = stats
        self._text_of = text_of
        self._begin = begin
        self._deltas = deltas
        # The answers by call of generate, and the calls of generate by request.
        self._made: dict[int, dict[int, RequestOutput]] = {}
        self._claims: dict[int, int] = {}
        # The answers for the caller of step, one entry at most, "next": to pop it is one operation, so no fault between
        # two can lose it.
        self._for_step: dict[str, StepOutput] = {}

    @contextmanager
    def claimed(self, requests: Sequence[Request]) -> Iterator[dict[int, RequestOutput]]:
        """Yields a dict that gets the answers to these requests by id; no step returns them while the context lasts.

        Raises:
            Interrupted: in place of a KeyboardInterrupt within, with the answers so far.
        """
        done: dict[int, RequestOutput] = {}
        try:
            self._made[id(done)] = done
            self._claims.update((request.request_id, id(done)) for request in requests)
            yield done
        except KeyboardInterrupt as interrupt:
            raise Interrupted(self.answers(requests, done)) from interrupt
        finally:
            self._made.pop(id(done), None)
            for request in requests:
                self._claims.pop(request.request_id, None)

    def answers(self, requests: Sequence[Request], done: dict[int, RequestOutput]) -> list[RequestOutput]:
        """The finished answers in the order of the requests; for aborted requests the tokens so far."""
        return [done.get(request.request_id) or self.output(request) for request in requests]

    def take(self) -> StepOutput:
        """The answers that no call has claimed, once each; taken last of all, or they are lost with the call."""
        return self._for_step.pop("next", None) or self._begin()

    def unclaimed(self) -> list[Request]:
        """The leaders of the unfinished groups that no call has claimed."""
        return [leader for leader in self._groups.unfinished.values() if leader.request_id not in self._claims]

    def make(self) -> list[Exception]:
        """Makes the answers that are complete; returns what failed for some of them, which are made again."""
        failures: list[Exception] = []
        for leader in self._groups.complete():
            call = self._claims.get(leader.request_id)
            made = None if call is None else self._made.get(call)
            if made is None:
                made = self._for_step.get("next") or self._for_step.setdefault("next", self._begin())
                self._deltas.note_end(leader, made)
            if leader.request_id not in made:  # a fault may have come after it was put there
                try:
                    made[leader.request_id] = self._output_or_blame(leader)
                except Exception as error:
                    failures.append(error)
                    continue
                self.count(leader)
            self._groups.forget(leader)
        self._groups.ended[:] = [request for leader in self._groups.complete() for request in group_of(leader)]
        return failures

    def count(self, leader: Request) -> None:
        """Counts the answers of a group, which nobody waits for any more."""
        self._stats.note_answers(group_of(leader))

    def output(self, request: Request, *, has_text: bool = True) -> RequestOutput:
        """A request's answer, or what there is of it."""
        finish = request.finish_reason or FinishReason.ABORT
        return RequestOutput(
            prompt_token_ids=request.prompt.tolist(),
            token_ids=list(request.output),
            text=self._text_of(request) if has_text else "",
            finish_reason=finish.value,
            cached_tokens=request.cached_tokens or 0,
            logprobs=None if request.params.logprobs is None else list(request.logprobs),
            logits=np.stack(request.logits) if request.logits else None,
            siblings=tuple(self.output(sibling, has_text=has_text) for sibling in request.siblings),
            error=request.error,
            seed=request.seed,
        )

    def _output_or_blame(self, leader: Request) -> RequestOutput:
        """A group's answer; without its text where that cannot be had, after some tries that raise."""
        try:
            return self.output(leader)
        except Exception as error:
            if not self._recovery.blame(leader, error):
                raise
            leader.error = f"{type(error).__name__}: {error}"
            return self.output(leader, has_text=False)
