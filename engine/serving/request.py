"""What a caller asks for, what becomes of it, and what is given back."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from engine.errors import RequestError
from engine.memory.scope import CacheScope, is_text

MAX_LOGPROBS = 20
AGING_SECONDS = 10.0  # a level of priority is overtaken by this much earlier an arrival


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: 0 is greedy; else logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this, in (0, 1].
        seed: of this request's own random stream: the same seed and prompt give the same answer whoever shares
            the batch.
        stop_token_ids: tokens that end the answer; they are part of it.
        ignore_eos: do not stop at the model's end-of-text tokens.
        logprobs: how many of the most likely tokens to report at each position beside the chosen one, 0 to 20;
            None reports nothing.
        n: answers to draw from one prompt, at least 1; answer ``i`` uses ``seed + i`` and shares the prompt's pages.
        priority: higher goes first; each level is worth as much as ``AGING_SECONDS`` of waiting. Under the eviction
            policy "priority" what is cached of it stays longer, too.
        timeout: seconds from arrival after which the request is ended with what it has; None never.
        tenant_salt: prompts share cached prefixes only with prompts of the same salt.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    priority: int = 0
    timeout: float | None = None
    tenant_salt: str = ""

    def __post_init__(self) -> None:
        """Checks every value; raises RequestError."""
        rules = (
            ("max_new_tokens", _is_int(self.max_new_tokens) and self.max_new_tokens >= 1, "a whole number at least 1"),
            (
                "temperature",
                _is_number(self.temperature) and 0 <= self.temperature < float("inf"),
                "0 (greedy) or positive and finite",
            ),
            ("top_k", _is_int(self.top_k) and 0 <= self.top_k < 2**31, "0 (all tokens) or a positive whole number"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", _is_int(self.seed) and 0 <= self.seed < 2**31, "a whole number from 0 to 2**31 - 1"),
            ("n", _is_int(self.n) and self.n >= 1, "a whole number at least 1"),
            ("priority", _is_int(self.priority) and abs(self.priority) < 2**31, "a whole number of 32 bits"),
            (
                "timeout",
                self.timeout is None or (_is_number(self.timeout) and self.timeout > 0),
                "None or a positive number of seconds",
            ),
            ("tenant_salt", isinstance(self.tenant_salt, str) and is_text(self.tenant_salt), "Unicode text"),
            (
                "logprobs",
                self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
                f"None or from 0 to {MAX_LOGPROBS}",
            ),
        )
        for name, holds, rule in rules:
            if not holds:
                raise RequestError(f"{name}={getattr(self, name)!r} is not allowed: it must be {rule}")
        stop = self.stop_token_ids
        if not isinstance(stop, list | tuple | set | frozenset) or not all(map(_is_int, stop)):
            raise RequestError(f"stop_token_ids={stop!r} is not allowed: it must be a list of whole numbers")
        object.__setattr__(self, "stop_token_ids", tuple(stop))


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


class FinishReason(StrEnum):
    """Why an answer ended.

    STOP: by a token that ends it. LENGTH: by its length. ABORT: by its caller. TIMEOUT: its time was up. NON_FINITE:
    the model's logits were no numbers to choose a token by. ERROR: steps failed on its account, see ``recovery``.
    """

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    NON_FINITE = "non_finite"
    ERROR = "error"


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities at one generated position, of the model's own distribution (before temperature).

    Attributes:
        chosen: of the token that was generated.
        top: the most likely token ids and theirs, best first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RequestOutput:
    """What a request came to.

    Attributes:
        prompt_token_ids: the prompt as it was fed.
        token_ids: the generated tokens.
        text: the generated tokens as text; empty where the model has no tokenizer.
        finish_reason: a ``FinishReason``: "stop", "length", "abort", "timeout", "non_finite" or "error".
        cached_tokens: tokens of the prompt that were not computed because their pages were cached.
        logprobs: one entry a generated token where the request asked for them.
        logits: float32 ``[len(token_ids), vocab]`` where ``generate`` was asked to return them.
        siblings: the other ``n - 1`` answers drawn from the prompt.
        error: what was wrong, where ``finish_reason`` is "non_finite" or "error"; else None.
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


@dataclass(eq=False)
class Request:
    """One request on its way through the engine; lives on the host only.

    Attributes:
        prompt: token ids, int32 ``[prompt_len]``.
        params: how to choose its tokens.
        stop_ids: every token that ends it.
        req_pool_idx: its page-table row while it runs, else None.
        replica: whose row that is, where there are several.
        num_prefilled: tokens whose keys and values were in the pool after its last step that was not of decoding.
        is_decoding: whether it has generated a token since it was admitted.
        output: tokens generated so far.
        scope: under which its prefix may be shared.
        arrival: seconds on the scheduler's clock; None until the scheduler has it.
        cached_tokens: tokens found cached when it was first admitted; None before.
        retractions: how often its pages were taken back.
        siblings: the requests of the other answers to the same prompt.
        error: what was wrong, see ``RequestOutput``.
        failures: steps that failed on its account since it got its last token.
    """

    request_id: int
    prompt: npt.NDArray[np.int32]
    params: SamplingParams
    stop_ids: frozenset[int]
    scope: CacheScope
    arrival: float | None = None
    req_pool_idx: int | None = None
    replica: int = 0
    num_prefilled: int = 0
    is_decoding: bool = False
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

    @property
    def rank(self) -> tuple[float, int]:
        """Who is served first: the smallest. Grows with arrival alone, so that nobody waits for ever; never a tie."""
        return (self.arrival or 0.0) - self.params.priority * AGING_SECONDS, self.request_id

    def is_late(self, now: float) -> bool:
        """Whether its time is up."""
        timeout = self.params.timeout
        return timeout is not None and self.arrival is not None and now - self.arrival >= timeout

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens known so far."""
        return len(self.prompt) + len(self.output)

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are in the pool: while decoding, all but the last one."""
        return self.num_tokens - 1 if self.is_decoding else self.num_prefilled

    @property
    def max_tokens(self) -> int:
        """Most tokens whose keys and values it can ever need: the last generated token is never fed back."""
        return len(self.prompt) + self.params.max_new_tokens - 1

    @property
    def num_pending(self) -> int:
        """Known tokens that the pool does not hold yet: 1 while decoding, more while prefilling."""
        return self.num_tokens - self.num_computed

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Token ids of positions ``start`` to ``stop - 1``, int32."""
        split = len(self.prompt)
        if stop <= split:
            return self.prompt[start:stop]
        generated = np.asarray(self.output[max(start - split, 0) : stop - split], np.int32)
        return generated if start >= split else np.concatenate([self.prompt[start:], generated])

    def begin(self, num_computed: int) -> None:
        """Notes for how many of its tokens the pool holds keys and values, before any step of it."""
        self.num_prefilled, self.is_decoding = num_computed, False

    def note_end(self) -> bool:
        """Whether the last generated token ends the answer; notes why."""
        if self.output[-1] in self.stop_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.output) == self.params.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH
        return self.finish_reason is not None

    def note_non_finite(self) -> None:
        """Ends the answer where no token could be chosen."""
        self.finish_reason = FinishReason.NON_FINITE
        self.error = (
            f"the logits after {self.num_tokens} tokens are NaN or infinite: the model's numbers exceed its dtype or "
            "the pool's; use float32 or bfloat16 for both"
        )

    def note_failure(self) -> int:
        """Counts a step that failed on its account; returns how many have since its last token."""
        if self.failures_at != len(self.output):
            self.failures = 0
        self.failures, self.failures_at = self.failures + 1, len(self.output)
        return self.failures

    def settle(self) -> None:
        """Makes its parts agree after a fault that may have come between any two of them."""
        del self.logprobs[len(self.output) :], self.logits[len(self.output) :]
        if self.output and self.finish_reason is None:
            self.note_end()
