"""Log-probabilities as JSON, in the two forms of the API, and the texts of the tokens that they name."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

from engine.models.text import Tokenizer
from engine.models.token_bytes import TokenBytes
from engine.serving.request import TokenLogprobs

LEAST = -9999.0  # stands for minus infinity, which JSON cannot say


class TokenNames:
    """The text of each token.

    Args:
        tokenizer: None where the model has none; a token is then named by its id.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._bytes = TokenBytes(tokenizer) if tokenizer else None
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def of(self, token: int) -> tuple[str, bytes]:
        """Name and bytes of a token; part of a character is named by its bytes."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._look_up(token)
        return known

    def is_text(self, token: int) -> bool:
        """Whether a token adds its bytes to a text."""
        return self._tokenizer is not None and not self._tokenizer.is_special(token)

    def _look_up(self, token: int) -> tuple[str, bytes]:
        if self._bytes is None:
            return f"token_id:{token}", b""
        spelt = self._bytes.of(token)
        try:
            return spelt.decode(), spelt
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt), spelt


class LogprobWriter(Protocol):
    """Writes the log-probabilities of an answer, all at once or as they come."""

    def write(self, index: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The JSON of the next tokens of an answer.

        Args:
            index: which answer.
            tokens: its tokens.
            logprobs: as many.
        """


class ChatLogprobs:
    """The form of chat completions: an object for each token.

    Args:
        names: the texts of tokens.
    """

    def __init__(self, names: TokenNames) -> None:
        self._names = names

    def write(self, index: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """As ``LogprobWriter.write``."""
        pairs = zip(tokens, logprobs, strict=True)
        return {
            "content": [self._entry(token, each.chosen) | self._top(each) for token, each in pairs],
            "refusal": None,
        }

    def _top(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        return {"top_logprobs": [self._entry(token, value) for token, value in logprobs.top]}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name, spelt = self._names.of(token)
        return {"token": name, "bytes": list(spelt), "logprob": max(logprob, LEAST)}


class CompletionLogprobs:
    """The older form: a list for each kind of value, and where in the answer's text each token begins.

    Args:
        names: the texts of tokens.
    """

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._texts: dict[int, _Length] = {}

    def write(self, index: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """As ``LogprobWriter.write``; called with the tokens of each answer in their order."""
        length = self._texts.setdefault(index, _Length())
        pairs = list(zip(tokens, logprobs, strict=True))
        return {
            "tokens": [self._names.of(token)[0] for token in tokens],
            "token_logprobs": [max(each.chosen, LEAST) for each in logprobs],
            "top_logprobs": [self._top(token, each) for token, each in pairs],
            "text_offset": [length.add(self._names, token) for token in tokens],
        }

    def _top(self, token: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens by name; the chosen one is there in any case."""
        best = [*logprobs.top, (token, logprobs.chosen)]
        return {self._names.of(other)[0]: max(value, LEAST) for other, value in reversed(best)}


class _Length:
    """Characters that the tokens of an answer have made so far."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._characters = 0

    def add(self, names: TokenNames, token: int) -> int:
        """Characters before a token, which is added."""
        before = self._characters
        if names.is_text(token):
            self._characters += len(self._decoder.decode(names.of(token)[1]))
        return before
