"""Turns a caller's prompts and parameters into requests, or refuses what can never be served."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.distributed.agreement import Agreement
from engine.errors import PromptTooLong, RequestError, shown
from engine.memory.scope import CacheScope
from engine.models.model_config import ModelConfig
from engine.models.text import Tokenizer
from engine.models.text_stream import TextStream
from engine.serving.answer_text import AnswerText
from engine.serving.request import Request
from engine.serving.sampling_params import SEEDS, SamplingParams

Checked = tuple[npt.NDArray[np.int32], SamplingParams]


class Intake:
    """Checks prompts and numbers requests.

    Args:
        model: has the vocabulary and the end-of-text tokens.
        tokenizer: encodes texts and may add an end-of-text token; None where prompts must be token ids.
        context_length: most tokens of prompt and answer together.
        scope_for: returns, for a tenant salt, the scope under which a prompt may share cached prefixes.
    """

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: Tokenizer | None,
        context_length: int,
        scope_for: Callable[[str], CacheScope],
    ) -> None:
        self._scope_for = scope_for
        self._vocab_size = model.vocab_size
        self._eos = frozenset(model.eos_token_id) | (tokenizer.eos_token_ids if tokenizer else frozenset())
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._ids = count(1)  # its next is atomic: requests are made in any thread

    def check(
        self, prompts: Iterable[str | Sequence[int]], params: SamplingParams | Iterable[SamplingParams] | None
    ) -> list[Checked]:
        """Checks the requests of one call, and draws the seeds that they leave open.

        Args:
            prompts: texts, or lists of token ids.
            params: parameters for all prompts, or one for each; None is the default.

        Returns:
            For each prompt, for ``make``: its tokens, int32 ``[n]``, and its parameters with a seed.

        Raises:
            RequestError: a prompt can never be served, or the numbers of prompts and parameters differ.
        """
        given = _as_list(prompts, "prompts", "a list of prompts, [prompt] for a single one")
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(given)
        else:
            each = _as_list(params, "sampling_params", "a SamplingParams, or one for each prompt")
        if len(each) != len(given):
            raise RequestError(f"{len(each)} sampling_params for {len(given)} prompts; give one, or one for each")
        for param in each:
            if not isinstance(param, SamplingParams):
                raise RequestError(f"sampling_params holds {shown(param)}; give a SamplingParams for each prompt")
        return [self._cut(prompt, param) for prompt, param in zip(given, each, strict=True)]

    def check_in_all(
        self,
        agreement: Agreement,
        prompts: Iterable[str | Sequence[int]],
        params: SamplingParams | Iterable[SamplingParams] | None,
    ) -> list[Checked]:
        """``check`` by process 0, whose result, seeds included, or refusal holds in every process.

        Raises:
            RequestError: a request can never be served; in processes other than 0, whatever stopped its ``check``.
            ProcessLost: process 0 is gone.
        """
        return agreement.decided_by_first(lambda: self.check(prompts, params), encode=_to_json, decode=_from_json)

    def make(self, checked: Checked) -> Request:
        """Makes a request and its siblings, one for each further answer to the prompt."""
        ids, params = checked
        first, *siblings = [self._make(ids, params, index) for index in range(params.n)]
        first.siblings = siblings
        return first

    def _cut(self, prompt: str | Sequence[int], params: SamplingParams) -> Checked:
        """The prompt as tokens, and its parameters with a seed and an answer that fits into the context."""
        ids = self._token_ids(prompt)
        room = self._context_length - len(ids)
        if room < 1:
            raise PromptTooLong(
                f"prompt of {len(ids)} tokens leaves no room for an answer in a context of {self._context_length}"
                f" tokens; shorten it to at most {self._context_length - 1}"
            )
        self._require_known("stop_token_ids", params.stop_token_ids)
        self._require_known("logit_bias", [token for token, _ in params.biases])
        too_early = self._too_early(params)
        if all(token in too_early for token in range(self._vocab_size)):
            raise RequestError(
                f"with min_tokens={params.min_tokens} no token could be chosen, because every one of the model's "
                f"{self._vocab_size} tokens ends answers; leave some out of stop_token_ids"
            )
        if params.stop and self._tokenizer is None:
            raise RequestError(
                "stop has texts, but the model has no tokenizer.json, so no text can end an answer; use stop_token_ids"
            )
        seed = params.seed
        if seed is None:  # from the system, so that seeding a generator of this process does not repeat it
            seed = secrets.randbelow(SEEDS) if params.temperature > 0 else 0
        most = min(params.max_new_tokens, room)
        least = min(params.min_tokens, most)
        return ids, params.decided(seed=seed, max_new_tokens=most, min_tokens=least)

    def _require_known(self, name: str, tokens: Iterable[int]) -> None:
        unknown = next((token for token in tokens if token >= self._vocab_size), None)
        if unknown is not None:
            raise RequestError(
                f"{name} holds {unknown}, which the model cannot choose; ids run from 0 to {self._vocab_size - 1}"
            )

    def _make(self, ids: npt.NDArray[np.int32], params: SamplingParams, index: int) -> Request:
        text = None
        if params.stop and self._tokenizer is not None:
            text = AnswerText(TextStream(self._tokenizer, ids), params.stop, params.min_tokens)
        return Request(
            request_id=next(self._ids),
            prompt=ids,
            params=params,
            seed=((params.seed or 0) + index) % SEEDS,
            stop_ids=self._stop_ids(params),
            scope=self._scope_for(params.tenant_salt),
            text=text,
            too_early=self._too_early(params),
        )

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Every token that ends an answer."""
        return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)

    def _too_early(self, params: SamplingParams) -> frozenset[int]:
        """Every token that is not chosen before ``min_tokens``."""
        return frozenset(params.stop_token_ids) | self._eos if params.min_tokens else frozenset()

    def _token_ids(self, prompt: str | Sequence[int]) -> npt.NDArray[np.int32]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError("the model has no tokenizer.json, so a prompt must be a list of token ids")
            if not prompt:
                raise RequestError("the prompt is empty; give at least one character")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise RequestError(f"the prompt is not valid text: {error}; pass it as UTF-8") from error
            prompt = self._tokenizer.encode(prompt)
        ids = _as_array(prompt)
        if not ids.ndim or isinstance(prompt, bytes | bytearray):
            raise RequestError(f"a prompt is {shown(prompt)}; it must be text or a list of token ids")
        if ids.ndim != 1 or not len(ids):
            raise RequestError(f"the prompt is empty or not a flat list (shape {ids.shape}); give at least one token")
        if ids.dtype.kind not in "iu":
            raise RequestError(
                f"token ids must be whole numbers from 0 to {self._vocab_size - 1}; got {shown(prompt)}, as an array"
                f" of {ids.dtype}"
            )
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            wrong = ids[(ids < 0) | (ids >= self._vocab_size)][0]
            raise RequestError(f"token id {wrong} is outside the vocabulary; ids run from 0 to {self._vocab_size - 1}")
        return ids.astype(np.int32)


def _to_json(checked: list[Checked]) -> list[Any]:
    """Checked requests as JSON values; token ids and parameters are plain numbers and texts."""
    return [[ids.tolist(), dataclasses.asdict(params)] for ids, params in checked]


def _from_json(values: list[Any]) -> list[Checked]:
    """What ``_to_json`` was given."""
    return [(np.array(ids, np.int32), SamplingParams(**params)) for ids, params in values]


def _as_array(prompt: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(prompt)
    except Exception as error:  # NumPy's errors, or whatever a foreign array raises
        raise RequestError(f"the prompt is not a flat list of token ids: {error}; it is {shown(prompt)}") from error


def _as_list(values: Any, name: str, rule: str) -> list[Any]:
    """Any ordered iterable, a generator too, as a list; raises RequestError for anything else."""
    if isinstance(values, str):
        raise RequestError(f"{name} is one string; give {rule}")
    if isinstance(values, bytes | bytearray | Mapping | Set):
        raise RequestError(f"{name} is {shown(values)}, a {type(values).__name__}; give {rule}")
    try:
        each = iter(values)
    except TypeError as error:
        raise RequestError(f"{name} is {shown(values)}; give {rule}") from error
    return list(each)
