"""A request: its state and its result."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from engine.memory.scope import CacheScope
from engine.serving.answer_text import AnswerText
from engine.serving.sampling_params import SamplingParams

AGING_SECONDS = 10.0  # an arrival earlier by this outweighs one level of priority
NEVER = 2**31 - 1  # beyond every position


class FinishReason(StrEnum):
    """Why an answer ended.

    STOP: by a token or text that ends it. LENGTH: by its length. ABORT: by its caller. TIMEOUT: its time was up.
    NON_FINITE: the model's logits were NaN or infinite. ERROR: steps failed because of this request, see ``recovery``.
    """

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    NON_FINITE = "non_finite"
    ERROR = "error"


class RequestState(StrEnum):
    """The state of a request.

    NEW: the scheduler does not have it yet. WAITING: in the queue, without pages. RUNNING: it has a row. ENDED: it has
    a finish reason.
    """

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities at one generated position, of the model's own distribution (before temperature).

    Attributes:
        chosen: log-probability of the generated token.
        top: the most likely token ids with their log-probabilities, best first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RequestOutput:
    """The result of a request.

    Attributes:
        prompt_token_ids: the prompt as it was fed.
        token_ids: the generated tokens.
        text: the generated tokens as text, up to the stop text that ended it; empty where the model has no tokenizer.
        finish_reason: a ``FinishReason``: "stop", "length", "abort", "timeout", "non_finite" or "error".
        cached_tokens: tokens of the prompt that were not computed because their pages were cached.
        logprobs: one entry per generated token where the request asked for them.
        logits: float32 ``[len(token_ids), vocab]`` where ``generate`` was asked to return them.
        siblings: the other ``n - 1`` answers drawn from the prompt.
        error: what was wrong, where ``finish_reason`` is "non_finite" or "error"; else None.
        seed: seed of this answer, given or drawn; as ``SamplingParams.seed`` it gives the same answer again. A greedy
            request without a seed has 0.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    logits: npt.NDArray[np.float32] | None = None
    siblings: tuple[RequestOutput, ...] = ()
    error: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class AnswerDelta:
    """What an answer has gained since it was last reported.

    Attributes:
        token_ids: its new tokens.
        text: the text that is certain now and was not before. What later tokens may still change, as the first bytes of
            a character or what may be the beginning of a stop text, comes with them, or with the last delta.
        logprobs: of the new tokens, where the request asked for them.
        index: which of the ``n`` answers to the prompt, from 0.
        finish_reason: as ``RequestOutput.finish_reason`` in the last delta of the answer, before that None.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None = None
    index: int = 0
    finish_reason: str | None = None


@dataclass(eq=False, slots=True)
class RequestTimes:
    """When what happened to a request, in seconds on the clock of ``EngineStats``; NaN: it has not happened.

    They are for metrics alone: processes that share a plan have different clocks.

    Attributes:
        arrived: its arrival.
        admitted: when it first had pages.
        first_token: its first token.
        last_token: its last token; while it runs, ``TokenTimes`` has the time.
        ended: its last token, where that has ended it.
    """

    arrived: float = math.nan
    admitted: float = math.nan
    first_token: float = math.nan
    last_token: float = math.nan
    ended: float = math.nan


@dataclass(eq=False)
class Request:
    """One request on its way through the engine; lives on the host only.

    Attributes:
        prompt: token ids, int32 ``[prompt_len]``.
        params: how to choose its tokens.
        seed: seed of its random stream, given or drawn.
        stop_ids: every token that ends it.
        too_early: the tokens that are not chosen before its answer has ``min_tokens``; empty without a least length.
        state: its state; only the methods below change it.
        req_pool_idx: its page-table row while it runs, else None.
        replica: index of the replica that it runs on.
        output: tokens generated so far.
        scope: the scope in which its prefix may be shared.
        arrival: seconds on the scheduler's clock; None until the scheduler has it.
        cached_tokens: tokens found cached when it was first admitted; None before.
        retractions: how often its pages were taken back.
        siblings: the requests of the other answers to the same prompt.
        error: what was wrong, see ``RequestOutput``.
        failures: steps that failed because of it since its last token.
        times: when what happened to it.
        text: the text of its answer, where a stop text may end it.
    """

    request_id: int
    prompt: npt.NDArray[np.int32]
    params: SamplingParams
    stop_ids: frozenset[int]
    scope: CacheScope
    seed: int = 0
    arrival: float | None = None
    req_pool_idx: int | None = None
    replica: int = 0
    state: RequestState = RequestState.NEW
    cached_tokens: int | None = None
    retractions: int = 0
    siblings: list[Request] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    logits: list[npt.NDArray[np.float32]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    failures: int = 0
    failures_at: int = 0  # tokens of the answer at the last of them
    text: AnswerText | None = None
    too_early: frozenset[int] = frozenset()
    times: RequestTimes = field(default_factory=RequestTimes)

    @property
    def rank(self) -> tuple[float, int]:
        """The smallest is served first. It grows with arrival alone, so that no request starves; there are no ties."""
        return (self.arrival or 0.0) - self.params.priority * AGING_SECONDS, self.request_id

    def is_late(self, now: float) -> bool:
        """Whether its time is up."""
        timeout = self.params.timeout
        return timeout is not None and self.arrival is not None and now - self.arrival >= timeout

    @property
    def adjusts_until(self) -> int:
        """The first position from which on the model's own logits choose its tokens: 0 or ``NEVER`` for most."""
        if self.params.adjusts_logits:
            return NEVER
        return len(self.prompt) + self.params.min_tokens if self.too_early else 0

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens known so far."""
        return len(self.prompt) + len(self.output)

    @property
    def max_tokens(self) -> int:
        """Most tokens whose keys and values it can ever need: the last generated token is never fed back."""
        return len(self.prompt) + self.params.max_new_tokens - 1

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Token ids of positions ``start`` to ``stop - 1``, int32."""
        split = len(self.prompt)
        if stop <= split:
            return self.prompt[start:stop]
        generated = np.asarray(self.output[max(start - split, 0) : stop - split], np.int32)
        return generated if start >= split else np.concatenate([self.prompt[start:], generated])

    def wait(self) -> None:
        """Notes that it is in the queue and has no row."""
        self.req_pool_idx, self.state = None, RequestState.WAITING

    def run(self, row: int) -> None:
        """Notes that it has a row."""
        self.req_pool_idx, self.state = row, RequestState.RUNNING

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """Ends it: its answer is complete, or no more of it will be generated."""
        self.finish_reason, self.error, self.state = reason, error, RequestState.ENDED

    def note_end(self) -> bool:
        """Whether the last generated token ends the answer; ends it then.

        Raises:
            CheckpointError: a stop text may end it, and the token has no text.
        """
        is_longest = len(self.output) == self.params.max_new_tokens
        if self.output[-1] in self.stop_ids or self._is_ended_by_text(is_longest):
            self.end(FinishReason.STOP)
        elif is_longest:
            self.end(FinishReason.LENGTH)
        return self.state is RequestState.ENDED

    def _is_ended_by_text(self, is_longest: bool) -> bool:
        if self.text is None:
            return False
        self.text.read(self.output)
        if is_longest:
            self.text.finish()
        return self.text.has_stopped

    def take_back_token(self) -> None:
        """Where ``note_end`` has failed for its text: forgets the last token, so that the next step fails here again.

        Then ``note_failure`` sees that it gets no further.
        """
        if self.text is not None and self.state is not RequestState.ENDED:
            self.output.pop()

    def note_non_finite(self) -> None:
        """Ends the answer where no token could be chosen."""
        self.end(
            FinishReason.NON_FINITE,
            f"the logits after {self.num_tokens} tokens are NaN or infinite: the model's numbers exceed its dtype or "
            "the pool's; use float32 or bfloat16 for both",
        )

    def note_failure(self) -> int:
        """Counts a step that failed because of it; returns how many have since its last token."""
        if self.failures_at != len(self.output):
            self.failures = 0
        self.failures, self.failures_at = self.failures + 1, len(self.output)
        return self.failures

    def restart(self) -> None:
        """Makes its parts agree, without a row, after a fault that may have come between any two of them."""
        self.req_pool_idx = None
        if self.finish_reason is not None:
            self.state = RequestState.ENDED
        elif not self._has_come_to_its_end():
            self.state = RequestState.NEW if self.arrival is None else RequestState.WAITING
        del self.logprobs[len(self.output) :], self.logits[len(self.output) :]

    def _has_come_to_its_end(self) -> bool:
        """As ``note_end``, with any number of tokens; where their text cannot be had the next step is to fail."""
        try:
            return bool(self.output) and self.note_end()
        except Exception:
            del self.output[self.params.max_new_tokens - 1 :]
            return False
