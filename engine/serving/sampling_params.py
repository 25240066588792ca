"""How the tokens of a request are chosen, as its caller says it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from engine.errors import RequestError, shown
from engine.memory.scope import is_text

MAX_LOGPROBS = 20
MAX_ANSWERS = 128  # to one prompt; for more, give the prompt more than once
MAX_BIASES = 300
MAX_STOPS = 16
MAX_STOP_LENGTH = 1_024  # characters
SEEDS = 2**31
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

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

    Logits are adjusted in this order: ``logit_bias``; ``repetition_penalty``; ``frequency_penalty`` and
    ``presence_penalty``; tokens that end the answer, before ``min_tokens``. A greedy request takes the best of the
    result; any other draws from it after ``temperature``, ``min_p``, ``top_k`` and ``top_p``, in this order.

    NumPy's numbers are taken as Python's. A wrong value or name raises RequestError.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: 0 is greedy; else logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all. Of equal ones at the edge the lower ids stay.
        top_p: of these keep the smallest set of most likely tokens whose probability reaches this, in (0, 1]; 1 keeps
            all.
        seed: seed of this request's own random stream, 0 to 2**31 - 1: with the same seed a prompt gets the same answer
            in any batch. None draws one for each request, which ``RequestOutput.seed`` has.
        min_p: keep tokens whose probability, after temperature, is at least this part of the most likely one's, 0 to 1
            (arXiv 2407.01082); 0 keeps all. A greedy request does not read it.
        presence_penalty: taken off the logit of every token that the answer has already, -2 to 2.
        frequency_penalty: the same, times how often the answer has the token, -2 to 2.
        repetition_penalty: the logit of every token that prompt or answer has is divided by this where it is positive,
            else multiplied (arXiv 1909.05858); above 0 and at most 100; 1 changes nothing.
        logit_bias: added to the logits of these tokens, -100 to 100, for at most 300 of them; a mapping, kept as pairs.
        stop: texts that end the answer, at most 16 of up to 1,024 characters; the answer's text ends before the first
            of them. Its tokens are those up to the one that completed the stop text. Needs a tokenizer.
        min_tokens: until the answer has so many tokens nothing ends it by its contents: ``stop_token_ids`` and the
            model's end-of-text tokens are not chosen, these not even with ``ignore_eos``, and stop texts are not looked
            for. With a token that ends it an answer has at least one more.
        stop_token_ids: tokens that end the answer; they are part of it.
        ignore_eos: do not stop at the model's end-of-text tokens; they may be chosen.
        logprobs: how many of the most likely tokens to report at each position beside the chosen one, 0 to 20, of the
            model's own distribution; None reports nothing.
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
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    seed: int | None = None
    stop: str | Sequence[str] = ()
    min_tokens: int = 0
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
        self._require("min_p", _number(self.min_p, 0, 1), "from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(name, _number(getattr(self, name), -2, 2), "from -2 to 2")
        self._require("repetition_penalty", _number(self.repetition_penalty, 0, 100) or None, "above 0 and at most 100")
        bias = f"a mapping of at most {MAX_BIASES} token ids to numbers from -100 to 100"
        self._require("logit_bias", _biases(self.logit_bias), bias)
        self._require("stop", _texts(self.stop), f"at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters")
        self._require("min_tokens", _whole(self.min_tokens, 0), "a whole number from 0")
        if self.min_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} exceeds max_new_tokens={self.max_new_tokens}; lower it or raise that"
            )
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

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """``logit_bias`` as pairs of token id and bias, by id."""
        return self.logit_bias  # type: ignore[return-value]

    @property
    def adjusts_logits(self) -> bool:
        """Whether all tokens are chosen by more than temperature, ``top_k`` and ``top_p``: ``min_tokens`` apart."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1
        return bool(any(penalties) or (self.min_p and self.temperature) or self.logit_bias)

    def decided(self, *, seed: int, max_new_tokens: int, min_tokens: int) -> SamplingParams:
        """The same with what was left open decided, by values that keep the rules: they are not checked again."""
        values = {"seed": seed, "max_new_tokens": max_new_tokens, "min_tokens": min_tokens}
        decided = object.__new__(SamplingParams)
        decided.__dict__.update(self.__dict__, **values)
        return decided

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


def _biases(values: object) -> tuple[tuple[int, float], ...] | None:
    """Pairs of token id and bias, by id; None where one is wrong, they are too many, or a token has two."""
    try:
        pairs = list(values.items() if isinstance(values, Mapping) else values)  # type: ignore[call-overload]
        checked = {_whole(token, 0, 2**31): _number(bias, -100, 100) for token, bias in pairs}
    except (TypeError, ValueError):
        return None
    if isinstance(values, str) or len(pairs) > len(checked):
        return None
    if len(checked) > MAX_BIASES or None in checked or None in checked.values():
        return None
    return tuple(sorted((token, bias) for token, bias in checked.items() if token is not None and bias is not None))


def _texts(values: object) -> tuple[str, ...] | None:
    """Texts that may end an answer, each once; one string is one text."""
    values = (values,) if isinstance(values, str) else values
    if not isinstance(values, list | tuple) or len(values) > MAX_STOPS:
        return None
    known = [str(value) for value in values if isinstance(value, str) and _is_stop(value)]
    return tuple(dict.fromkeys(known)) if len(known) == len(values) else None


def _is_stop(text: str) -> bool:
    return 0 < len(text) <= MAX_STOP_LENGTH and is_text(text)


def _tokens(values: object) -> tuple[int, ...] | None:
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, list | tuple | set | frozenset):
        return None
    known = [token for value in values if (token := _whole(value, 0, 2**31)) is not None]
    return tuple(known) if len(known) == len(values) else None
