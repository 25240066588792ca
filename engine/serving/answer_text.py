"""The text of an answer that grows, which may end before a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # its room loads jax
    from engine.models.text_stream import TextStream


class AnswerText:
    """The text of an answer, up to the first of its stop texts.

    The token that completes a stop text ends the answer. The text is cut before the stop text that is complete first;
    of several that one token completes, before the one that begins first. A stop text may lie across tokens, and
    begin anywhere: but it must end behind the text of the first ``min_tokens`` tokens.

    The cost of a token depends on neither the length of the answer nor that of a stop text.

    Args:
        stream: makes text of the tokens.
        stop: the texts that end it; none of them empty.
        min_tokens: see above.

    Attributes:
        num_tokens: tokens that it has been given.
        has_stopped: whether a stop text is complete; the tokens that come then add no text.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self.num_tokens = 0
        self.has_stopped = False
        self._stream = stream
        self._searches = [_Search(text) for text in stop]
        self._min_tokens = min_tokens
        self._is_finished = False
        self._taken: list[str] = []
        self._untaken: list[str] = []

    @property
    def text(self) -> str:
        """The text so far, without what a later token may change, and without a stop text and what follows it."""
        return "".join([*self._taken, *self._untaken])

    def push(self, token_ids: Sequence[int]) -> None:
        """Takes the next tokens of the answer.

        Raises:
            CheckpointError: a token cannot be decoded; those before it have been taken: see ``num_tokens``.
        """
        for token in token_ids:
            if not self.has_stopped:
                self._add(self._stream.push((token,)), counts=self.num_tokens >= self._min_tokens)
            self.num_tokens += 1

    def take(self) -> str:
        """Returns the text that is certain and was not taken yet: not what may be the beginning of a stop text."""
        untaken = "".join(self._untaken)
        certain = untaken[: len(untaken) - self._held]
        self._taken.append(certain)
        self._untaken = [untaken[len(certain) :]]
        return certain

    def finish(self) -> None:
        """Ends the text, when no more tokens come: all of it can be taken."""
        if not self.has_stopped:
            self._add(self._stream.finish(), counts=self.num_tokens > self._min_tokens)
        self._is_finished = True

    @property
    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        if self.has_stopped or self._is_finished:
            return 0
        return max((search.found for search in self._searches), default=0)

    def _add(self, piece: str, *, counts: bool) -> None:
        """Adds text; ``counts`` says whether a stop text may end in it."""
        if not piece:
            return
        self._untaken.append(piece)
        starts = [end - len(search.wanted) for search in self._searches if (end := search.first_end(piece, counts))]
        if starts:
            self.has_stopped = True
            untaken = "".join(self._untaken)  # has the whole stop text: none of it could be taken
            self._untaken = [untaken[: len(untaken) - len(piece) + min(starts)]]


class _Search:
    """Looks for a text in a text that comes in pieces.

    Attributes:
        wanted: the text to find, not empty.
        found: how much of it the pieces so far end with.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        self.found = 0

    def first_end(self, piece: str, counts: bool) -> int | None:
        """Where in the next piece the text first ends; None where it does not, or where that does not count."""
        wanted, found = self.wanted, self.found
        if not found and wanted[0] not in piece:
            return None
        shorter = _shorter_beginnings(wanted)
        for end, character in enumerate(piece, 1):
            while found and wanted[found] != character:
                found = shorter[found]
            found += wanted[found] == character
            if found == len(wanted):
                if counts:
                    return end
                found = shorter[found]
        self.found = found
        return None


@lru_cache(maxsize=64)
def _shorter_beginnings(text: str) -> list[int]:
    """For each length, how much of ``text`` its first so many characters end with, themselves as a whole left out."""
    shorter = [0, 0]
    for character in text[1:]:
        length = shorter[-1]
        while length and text[length] != character:
            length = shorter[length]
        shorter.append(length + (text[length] == character))
    return shorter
