"""Turns what a caller gives into a request, or says why it can never be served."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import RequestError
from engine.memory.scope import CacheScope
from engine.models.llama_config import LlamaConfig
from engine.models.text import Tokenizer
from engine.serving.request import Request, SamplingParams

Checked = tuple[npt.NDArray[np.int32], SamplingParams]


class Intake:
    """Checks prompts and numbers requests.

    Args:
        model: its vocabulary and end-of-text tokens.
        tokenizer: its end-of-text token counts too; None where prompts must be token ids.
        context_length: most tokens of prompt and answer together.
        scope_for: tenant salt to the scope under which a prompt may share cached prefixes.
    """

    def __init__(
        self,
        model: LlamaConfig,
        tokenizer: Tokenizer | None,
        context_length: int,
        scope_for: Callable[[str], CacheScope],
    ) -> None:
        self._scope_for = scope_for
        self._vocab_size = model.vocab_size
        self._eos = frozenset(model.eos_token_id) | (tokenizer.eos_token_ids if tokenizer else frozenset())
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._made = 0

    def check(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Checked]:
        """Checks the requests of one call.

        Args:
            prompts: texts, or lists of token ids.
            params: for all, or one for each prompt; None is the default.

        Returns:
            The tokens of each prompt, int32 ``[n]``, and its parameters, for ``make``.

        Raises:
            RequestError: a prompt can never be served, or the counts differ.
        """
        if isinstance(prompts, str):
            raise RequestError("prompts is one string; give a list of prompts, [prompt] for a single one")
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(f"{len(params)} sampling_params for {len(prompts)} prompts; give one, or one for each")
        for param in params:
            if not isinstance(param, SamplingParams):
                raise RequestError(f"sampling_params holds {param!r}; give a SamplingParams for each prompt")
        return [self._cut(prompt, param) for prompt, param in zip(prompts, params, strict=True)]

    def make(self, checked: Checked) -> Request:
        """Makes a request, and those of its siblings."""
        ids, params = checked
        first, *siblings = [self._make(ids, params, index) for index in range(params.n)]
        first.siblings = siblings
        return first

    def _cut(self, prompt: str | Sequence[int], params: SamplingParams) -> Checked:
        """The prompt as tokens, and the answer cut to what the context leaves."""
        ids = self._token_ids(prompt)
        room = self._context_length - len(ids)
        if room < 1:
            raise RequestError(
                f"prompt of {len(ids)} tokens leaves no room for an answer in a context of {self._context_length}"
                f" tokens; shorten it to at most {self._context_length - 1}"
            )
        return ids, dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, room))

    def _make(self, ids: npt.NDArray[np.int32], params: SamplingParams, index: int) -> Request:
        self._made += 1
        return Request(
            request_id=self._made,
            prompt=ids,
            params=dataclasses.replace(params, seed=(params.seed + index) % 2**31),
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos),
            scope=self._scope_for(params.tenant_salt),
        )

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
        if ids.ndim != 1 or not len(ids):
            raise RequestError(f"the prompt is empty or not a flat list (shape {ids.shape}); give at least one token")
        if not np.issubdtype(ids.dtype, np.integer):
            raise RequestError(f"token ids must be whole numbers; got an array of {ids.dtype}")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            wrong = ids[(ids < 0) | (ids >= self._vocab_size)][0]
            raise RequestError(f"token id {wrong} is outside the vocabulary; ids run from 0 to {self._vocab_size - 1}")
        return ids.astype(np.int32)


def _as_array(prompt: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(prompt)
    except ValueError as error:
        raise RequestError(f"the prompt is not a flat list of token ids: {error}") from error
