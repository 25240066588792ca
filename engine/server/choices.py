"""The answers to one request of the API: several to each of several prompts, numbered through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from engine.server.answer_json import COMPLETE
from engine.server.api_error import ApiError, engine_failed, stopping
from engine.serving.answering import Answering
from engine.serving.async_llm import AsyncLLM
from engine.serving.request import AnswerDelta, FinishReason, RequestOutput
from engine.serving.sampling_params import SamplingParams

Prompts = Sequence[str] | Sequence[Sequence[int]]


class Choices:
    """The answers under way: answer ``i`` to prompt ``p`` is choice ``p * n + i``.

    Args:
        answerings: the engine's requests, one for each prompt.
        n: answers to each.
    """

    def __init__(self, answerings: Sequence[Answering], n: int) -> None:
        self._answerings = answerings
        self._n = n
        self.count = n * len(answerings)

    @classmethod
    async def begin(cls, llm: AsyncLLM, prompts: Prompts, params: SamplingParams, *, streams: bool) -> Choices:
        """Queues the prompts, all or none.

        Args:
            llm: the engine.
            prompts: texts, or lists of token ids.
            params: for all of them.
            streams: whether ``deltas`` will be read, else ``outputs``.

        Raises:
            EngineError: as ``AsyncLLM.submit``; then nothing is answered.
        """
        begun: list[Answering] = []
        try:
            for prompt in prompts:
                begun.append(await llm.submit(prompt, params, streams=streams))
        except BaseException:
            _abort(begun)
            raise
        return cls(begun, params.n)

    async def deltas(self) -> AsyncIterator[list[tuple[int, AnswerDelta]]]:
        """What the choices gain, with their numbers, as it comes."""
        if len(self._answerings) == 1:
            async for deltas in self._answerings[0]:
                yield [(delta.index, delta) for delta in deltas]
            return
        readers = [aiter(answering) for answering in self._answerings]
        awaited = {asyncio.ensure_future(anext(reader)): number for number, reader in enumerate(readers)}
        try:
            while awaited:
                done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                gained: list[tuple[int, AnswerDelta]] = []
                for task in done:
                    number = awaited.pop(task)
                    try:
                        gained += [(number * self._n + delta.index, delta) for delta in task.result()]
                    except StopAsyncIteration:
                        continue
                    awaited[asyncio.ensure_future(anext(readers[number]))] = number
                yield gained
        finally:
            for task in awaited:
                task.cancel()

    async def outputs(self) -> list[RequestOutput]:
        """The whole answers, in the order of the choices; raises ApiError where one is not complete."""
        results = await asyncio.gather(*(answering.result() for answering in self._answerings))
        outputs = [output for result in results for output in (result, *result.siblings)]
        for output in outputs:
            if fault := fault_of(output.finish_reason):
                raise fault
        return outputs

    def usage(self, completion_tokens: int) -> dict[str, Any]:
        """The counts of tokens, as the API reports them."""
        prompts = sum(answering.prompt_tokens for answering in self._answerings)
        cached = sum(answering.cached_tokens for answering in self._answerings)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": completion_tokens,
            "total_tokens": prompts + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def abort(self) -> None:
        """Ends what has not ended."""
        _abort(self._answerings)


def fault_of(finish_reason: str | None) -> ApiError | None:
    """What to tell of an answer that has ended, but not as an answer should."""
    if finish_reason is None or finish_reason in COMPLETE:
        return None
    return stopping() if finish_reason == FinishReason.ABORT else engine_failed()


def _abort(answerings: Sequence[Answering]) -> None:
    for answering in answerings:
        answering.abort()
