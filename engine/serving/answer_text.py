"""The text of an answer that grows, which may end before a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # its room loads jax
    from engine.models.text_stream import TextStream


class AnswerText:
    """The text of an answer, up to the first of its stop texts.

    A fault in any call leaves it unusable but for ``read``, which makes it agree with the answer's tokens again.

    The token that completes a stop text ends the answer. The text is cut before the stop text that is complete first;
    of several that one token completes, before the one that begins first. A stop text may lie across tokens, and
    begin anywhere: but it must end behind the text of the first ``min_tokens`` tokens.

    The cost of a token depends on neither the length of the answer nor that of a stop text.

    Args:
        stream: makes text of the tokens.
        stop: the texts that end it; none of them empty.
        min_tokens: see above.

    Attributes:
        num_tokens: tokens of the answer that are in it.
        has_stopped: whether a stop text is complete; the tokens that come then add no text.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._stream = stream
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_taken = 0  # characters
        self._begin()

    @property
    def text(self) -> str:
        """The text so far, without what a later token may change, and without a stop text and what follows it."""
        return "".join(self._pieces)

    def read(self, output: Sequence[int]) -> None:
        """Takes the tokens that an answer has gained since the last call.

        After a fault, or where the answer has lost a token to one, it takes all of them again.

        Args:
            output: all tokens of the answer so far.

        Raises:
            CheckpointError: a token cannot be decoded.
        """
        if not self._is_whole or self.num_tokens > len(output):
            self._stream.restart()
            self._begin()
        self.push(output[self.num_tokens :])

    def push(self, token_ids: Sequence[int]) -> None:
        """Takes the next tokens of the answer; raises as ``read``."""
        self._is_whole = False
        for token in token_ids:
            if not self.has_stopped:
                self._add(self._stream.push((token,)), counts=self.num_tokens >= self._min_tokens)
            self.num_tokens += 1
        self._is_whole = True

    def take(self) -> str:
        """Returns the text that is certain and was not taken yet: not what may be the beginning of a stop text."""
        untaken = self._last(self._length - self._num_taken)
        certain = untaken[: max(len(untaken) - self._held, 0)]
        self._num_taken += len(certain)
        return certain

    def finish(self) -> None:
        """Ends the text, when no more tokens come: all of it can be taken."""
        self._is_whole = False
        if not self.has_stopped:
            self._add(self._stream.finish(), counts=self.num_tokens > self._min_tokens)
        self._is_finished = self._is_whole = True

    def _begin(self) -> None:
        """Goes to before the first token; what has been taken stays taken."""
        self.num_tokens = 0
        self.has_stopped: bool = False
        self._is_finished = False
        self._searches = [_Search(text) for text in self._stop]
        self._pieces: list[str] = []
        self._length = 0  # characters of the pieces
        self._is_whole = True  # False within a change, and after a fault there

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
        self._pieces.append(piece)
        starts = [end - len(search.wanted) for search in self._searches if (end := search.first_end(piece, counts))]
        if starts:
            self.has_stopped = True
            self._pieces = [self.text[: self._length + min(starts)]]  # a stop text may begin in an earlier piece
            self._length = len(self._pieces[0])
        else:
            self._length += len(piece)

    def _last(self, count: int) -> str:
        """The last ``count`` characters."""
        pieces: list[str] = []
        for piece in reversed(self._pieces):
            if count <= 0:
                break
            pieces.append(piece)
            count -= len(piece)
        return "".join(reversed(pieces))[-min(count, 0) :]


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
