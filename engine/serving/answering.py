"""The answers to one prompt while they come, for a coroutine that waits for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from itertools import chain
from typing import cast

from engine.errors import EngineError
from engine.serving.deltas import Follower
from engine.serving.request import AnswerDelta, Request, RequestOutput

# What an answer has gained, its output once it has ended, or what was wrong.
Gain = tuple["Answering", tuple[AnswerDelta, ...], RequestOutput | None, EngineError | None]


class Answering:
    """The answers to one prompt while they come; belongs to the event loop in which it was made.

    Iterating yields what the answers have gained since the last item, one AnswerDelta for each answer that has gained
    something; whoever reads slowly gets several steps in one. One reader at a time. When the iteration is given up
    before its end, as by a cancelled task, the request is aborted.

    Attributes:
        request: the engine's own record of it.
        prompt_tokens: tokens of the prompt.
        output: the whole output, once there is one.
        has_begun: whether anything of it was reported.
    """

    def __init__(self, request: Request, follower: Follower | None, abort: Callable[[Request], None]) -> None:
        self.prompt_tokens = len(request.prompt)
        self.output: RequestOutput | None = None
        self.loop = asyncio.get_running_loop()
        self.request = request
        self.has_begun = False
        self._abort = abort
        self._follower = follower
        self._gained: deque[AnswerDelta] = deque()
        self._changed = asyncio.Event()
        self._error: EngineError | None = None

    @property
    def request_id(self) -> int:
        """The engine's number for it."""
        return self.request.request_id

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed because their pages were cached; 0 before it is admitted."""
        return self.request.cached_tokens or 0

    @property
    def has_ended(self) -> bool:
        """Whether there is no more to come."""
        return self.output is not None or self._error is not None

    def abort(self) -> None:
        """Ends the request within a step, with the tokens it has; does nothing once it has ended. From any thread."""
        self._abort(self.request)

    async def result(self) -> RequestOutput:
        """Waits for the whole output; aborts the request where the waiting is cancelled.

        Raises:
            EngineError: the engine has failed.
        """
        async for _ in self:
            pass
        return cast(RequestOutput, self.output)  # the iteration ends with it, or raises

    async def __aiter__(self) -> AsyncGenerator[tuple[AnswerDelta, ...], None]:
        """Yields what the answers gain until they have ended; raises EngineError where the engine has failed."""
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                if self._gained:
                    gained = list(self._gained)
                    self._gained.clear()
                    yield _merged(gained)
                    if self._gained:
                        continue
                if self._error is not None:
                    raise self._error
                if self.output is not None:
                    return
        finally:
            if not self.has_ended:
                self.abort()
            self._changed.set()  # for one who reads on after the end

    # Called by the engine's thread.

    def take(self) -> tuple[AnswerDelta, ...]:
        """What the answers have gained, for ``gain``."""
        deltas = self._follower.take() if self._follower else ()
        self.has_begun = self.has_begun or bool(deltas)
        return deltas

    # Called in the event loop.

    def gain(self, deltas: tuple[AnswerDelta, ...], output: RequestOutput | None, error: EngineError | None) -> None:
        """Notes what the engine's thread has reported, until there is an end."""
        if self.has_ended:  # a fault came between its end and the note that it was told
            return
        self._gained.extend(deltas)
        self.output, self._error = output, error
        if deltas or self.has_ended:
            self._changed.set()


def gain_all(gained: list[Gain]) -> None:
    """Notes a step's gains of one event loop, in that loop."""
    for answering, deltas, output, error in gained:
        answering.gain(deltas, output, error)


def _merged(gained: list[AnswerDelta]) -> tuple[AnswerDelta, ...]:
    """One delta for each answer; ``gained`` in order of time."""
    if len(gained) == 1:
        return (gained[0],)
    by_answer: dict[int, list[AnswerDelta]] = {}
    for delta in gained:
        by_answer.setdefault(delta.index, []).append(delta)
    return tuple([deltas[0] if len(deltas) == 1 else _joined(deltas) for deltas in by_answer.values()])


def _joined(deltas: list[AnswerDelta]) -> AnswerDelta:
    return AnswerDelta(
        token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        text="".join([delta.text for delta in deltas]),
        logprobs=None
        if deltas[0].logprobs is None
        else tuple(chain.from_iterable(delta.logprobs or () for delta in deltas)),
        index=deltas[0].index,
        finish_reason=deltas[-1].finish_reason,
    )
