"""Parameters of a request, its state, and its result."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from engine.errors import RequestError, shown
from engine.memory.scope import CacheScope, is_text

MAX_LOGPROBS = 20
MAX_ANSWERS = 128  # to one prompt; for more, give the prompt more than once
SEEDS = 2**31
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
AGING_SECONDS = 10.0  # an arrival earlier by this outweighs one level of priority

Made = TypeVar("Made")


def _refuses_unknown_names(cls: type[Made]) -> type[Made]:
    """Lets a dataclass name the field that was meant, where Python's own error would not."""
    make: Callable[..., None] = cls.__init__
    known = sorted(field.name for field in fields(cls))  # type: ignore[arg-type]

    @wraps(make)
    def checked(self: Made, *values: Any, **named: Any) -> None:
        for name in named:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(known)}"
                raise RequestError(f"{cls.__name__} has no {name!r}; {hint}")
        make(self, *values, **named)

    cls.__init__ = checked  # type: ignore[method-assign, assignment]
    return cls


@_refuses_unknown_names
@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    NumPy's numbers are taken as Python's. A wrong value or name raises RequestError.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: 0 is greedy; else logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all. Of equal ones at the edge the lower ids stay.
        top_p: keep the smallest set of most likely tokens whose probability reaches this, in (0, 1]; 1 keeps all.
        seed: seed of this request's own random stream, 0 to 2**31 - 1: with the same seed a prompt gets the same answer
            in any batch. None draws one for each request, which ``RequestOutput.seed`` has.
        stop_token_ids: tokens that end the answer; they are part of it.
        ignore_eos: do not stop at the model's end-of-text tokens.
        logprobs: how many of the most likely tokens to report at each position beside the chosen one, 0 to 20;
            None reports nothing.
        n: answers to draw from one prompt, 1 to 128; answer ``i`` uses seed ``(seed + i) % 2**31`` and shares the
            prompt's pages.
        priority: higher goes first; each level is worth as much as ``AGING_SECONDS`` of waiting. Under the eviction
            policy "priority" what is cached of it stays longer, too.
        timeout: seconds from arrival after which the request is ended with what it has; None never.
        tenant_salt: prompts share cached prefixes only with prompts of the same salt.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    priority: int = 0
    timeout: float | None = None
    tenant_salt: str = ""

    def __post_init__(self) -> None:
        """Checks every value."""
        self._require("max_new_tokens", _whole(self.max_new_tokens, 1), "a whole number at least 1")
        hot = f"0 (greedy) or positive and at most {LARGEST_FLOAT32:.3g}"
        self._require("temperature", _number(self.temperature, 0, LARGEST_FLOAT32), hot)
        self._require("top_k", _whole(self.top_k, 0, 2**31), "0 (all tokens) or a positive whole number below 2**31")
        top_p = _number(self.top_p, 0, 1)
        self._require("top_p", top_p or None, "above 0 and at most 1")
        if self.seed is not None:
            self._require("seed", _whole(self.seed, 0, SEEDS), "None or a whole number from 0 to 2**31 - 1")
        self._require("n", _whole(self.n, 1, MAX_ANSWERS + 1), f"a whole number from 1 to {MAX_ANSWERS}")
        self._require("priority", _whole(self.priority, 1 - 2**31, 2**31), "a whole number of 32 bits")
        if self.timeout is not None:
            seconds = _number(self.timeout, 0, LARGEST_FLOAT32)
            self._require("timeout", seconds or None, "None or a positive and finite number of seconds")
        if self.logprobs is not None:
            allowed = _whole(self.logprobs, 0, MAX_LOGPROBS + 1)
            self._require("logprobs", allowed, f"None or a whole number from 0 to {MAX_LOGPROBS}")
        self._require("ignore_eos", _flag(self.ignore_eos), "True or False")
        salt = str(self.tenant_salt) if isinstance(self.tenant_salt, str) and is_text(self.tenant_salt) else None
        self._require("tenant_salt", salt, "a string that UTF-8 can spell")
        self._require("stop_token_ids", _tokens(self.stop_token_ids), "a list of token ids, whole numbers from 0")

    def _require(self, name: str, value: object, rule: str) -> None:
        """Takes ``value``, which is None where the field ``name`` breaks its rule."""
        if value is None:
            raise RequestError(f"{name}={shown(getattr(self, name))} is not allowed: it must be {rule}")
        object.__setattr__(self, name, value)


def _whole(value: object, least: int, end: int | None = None) -> int | None:
    """The value as Python's int; None where it is none, or not from ``least`` to ``end - 1``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return None
    return int(value) if least <= value and (end is None or value < end) else None


def _number(value: object, least: float, most: float) -> float | None:
    """The value as Python's float; None where it is none, NaN, or not from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    number = value if isinstance(value, int) else float(value)  # an int may be too large for a float
    return float(number) if least <= number <= most else None


def _flag(value: object) -> bool | None:
    return bool(value) if isinstance(value, bool | np.bool_) else None


def _tokens(values: object) -> tuple[int, ...] | None:
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, list | tuple | set | frozenset):
        return None
    known = [token for value in values if (token := _whole(value, 0, 2**31)) is not None]
    return tuple(known) if len(known) == len(values) else None


class FinishReason(StrEnum):
    """Why an answer ended.

    STOP: by a token that ends it. LENGTH: by its length. ABORT: by its caller. TIMEOUT: its time was up. NON_FINITE:
    the model's logits were NaN or infinite. ERROR: steps failed because of this request, see ``recovery``.
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
        text: the generated tokens as text; empty where the model has no tokenizer.
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


@dataclass(eq=False)
class Request:
    """One request on its way through the engine; lives on the host only.

    Attributes:
        prompt: token ids, int32 ``[prompt_len]``.
        params: how to choose its tokens.
        seed: seed of its random stream, given or drawn.
        stop_ids: every token that ends it.
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

    @property
    def rank(self) -> tuple[float, int]:
        """The smallest is served first. It grows with arrival alone, so that no request starves; there are no ties."""
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
        """Whether the last generated token ends the answer; ends it then."""
        if self.output[-1] in self.stop_ids:
            self.end(FinishReason.STOP)
        elif len(self.output) == self.params.max_new_tokens:
            self.end(FinishReason.LENGTH)
        return self.state is RequestState.ENDED

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
        del self.logprobs[len(self.output) :], self.logits[len(self.output) :]
        self.req_pool_idx = None
        if self.finish_reason is not None:
            self.state = RequestState.ENDED
        elif not (self.output and self.note_end()):
            self.state = RequestState.NEW if self.arrival is None else RequestState.WAITING
