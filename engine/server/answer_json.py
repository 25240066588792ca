"""Answers as JSON: whole, or as the events of a stream, whose unchanging parts are written once."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.server.logprob_json import LogprobWriter
from engine.serving.request import AnswerDelta, FinishReason, RequestOutput, TokenLogprobs

COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)  # finish reasons of answers that ended as they should
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class AnswerHead:
    """What every part of an answer repeats.

    Attributes:
        id: the request's id.
        created: seconds since 1970.
        model: the name that the client asked for.
    """

    id: str
    created: int
    model: str


class AnswerFormat(ABC):
    """The form of one endpoint's answers.

    Args:
        head: what every part repeats.
        logprobs: writes log-probabilities; None where they were not asked for.
        token_ids: whether the ids of tokens are written.
        counts: whether the last event of a stream has counts of tokens.
    """

    whole_object: str
    event_object: str

    def __init__(
        self, head: AnswerHead, logprobs: LogprobWriter | None, *, token_ids: bool = False, counts: bool = False
    ) -> None:
        self._head = head
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._counts = counts
        self._empty_is_news = token_ids or logprobs is not None
        opening = json.dumps(self._repeated(self.event_object))[:-1]
        self._begin = f'data: {opening}, "choices": [{{"index": '
        self._end = '}], "usage": null}\n\n' if counts else "}]}\n\n"

    def opening(self, choices: int) -> str:
        """The events that a stream begins with."""
        return ""

    def event(self, index: int, delta: AnswerDelta) -> str:
        """What one choice has gained, as an event; empty where a reader would see nothing new."""
        if not delta.text and delta.finish_reason is None and not self._empty_is_news:
            return ""
        reason = f'"{delta.finish_reason}"' if delta.finish_reason in COMPLETE else "null"
        more = self._more(index, delta.token_ids, delta.logprobs) if self._empty_is_news else '"logprobs": null'
        return f'{self._begin}{index}, {self._gain(delta.text)}, {more}, "finish_reason": {reason}{self._end}'

    def last(self, usage: dict[str, Any]) -> str:
        """The events that a stream ends with."""
        if not self._counts:
            return DONE
        return f"data: {json.dumps(self._repeated(self.event_object) | {'choices': [], 'usage': usage})}\n\n{DONE}"

    def whole(self, outputs: Sequence[RequestOutput], usage: dict[str, Any]) -> dict[str, Any]:
        """Complete answers."""
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return self._repeated(self.whole_object) | {"choices": choices, "usage": usage}

    def _choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        extras = self._extras(index, output.token_ids, output.logprobs)
        return {"index": index, **self._text(output.text), **extras, "finish_reason": output.finish_reason}

    @abstractmethod
    def _text(self, text: str) -> dict[str, Any]:
        """Where a whole answer has its text."""

    @abstractmethod
    def _gain(self, text: str) -> str:
        """Where an event has the text that is new, as JSON."""

    def _repeated(self, kind: str) -> dict[str, Any]:
        return {"id": self._head.id, "object": kind, "created": self._head.created, "model": self._head.model}

    def _more(self, index: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> str:
        return json.dumps(self._extras(index, tokens, logprobs))[1:-1]

    def _extras(self, index: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> dict[str, Any]:
        written = self._logprobs.write(index, tokens, logprobs or ()) if self._logprobs else None
        return {"logprobs": written} | ({"token_ids": list(tokens)} if self._token_ids else {})


class CompletionFormat(AnswerFormat):
    """The answers of ``/v1/completions``."""

    whole_object = event_object = "text_completion"

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _gain(self, text: str) -> str:
        return f'"text": {json.dumps(text)}'


class ChatFormat(AnswerFormat):
    """The answers of ``/v1/chat/completions``."""

    whole_object, event_object = "chat.completion", "chat.completion.chunk"

    def opening(self, choices: int) -> str:
        """An event for each choice, which says whose words follow."""
        role = '"delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null'
        return "".join(f"{self._begin}{index}, {role}{self._end}" for index in range(choices))

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _gain(self, text: str) -> str:
        return f'"delta": {{"content": {json.dumps(text)}}}' if text else '"delta": {}'
