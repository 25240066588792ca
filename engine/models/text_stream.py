"""The text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.errors import CheckpointError
from engine.models.text import CONTEXT_TOKENS, UNDECODABLE, Stream, Tokenizer, refused_as

_REPLACEMENT = "\ufffd"  # of bytes that are no character, or not yet


class TextStream:
    """Decodes an answer token by token: all pieces together are what ``Tokenizer.decode`` makes of all tokens.

    No piece is ever taken back. What the bytes at the end of the tokens may still become, one character at most, is
    held back until a token decides it.

    Between characters the tokenizer library's own incremental decoder does the work. Within one it cannot: it would
    hold back all text behind bytes that are wrong and decode it again with every token, and it fails where byte tokens
    (``<0xNN>``) that are wrong follow such as are right. There the last tokens are decoded again, at most
    ``2 * CONTEXT_TOKENS`` of them. Either way the cost of a token does not depend on how many came before it.

    It relies on what holds of byte-level, sentencepiece and word-piece decoders: a token's text depends on the tokens
    just before it, and no text depends on the tokens behind it but for a character that is not whole.

    Args:
        tokenizer: the tokenizer.
        prompt_ids: the tokens before the answer, of which only the last few matter.

    Raises:
        CheckpointError: the tokenizer cannot decode the tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] | npt.NDArray[np.int32] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = tokenizer.context_of(prompt_ids)
        self.restart()

    def restart(self) -> None:
        """Goes back to before the first token of the answer."""
        self._window = self._context  # the last tokens with text
        # What has been given of the window's text, the prompt's part included; None where that is all of it.
        self._given: str | None = self._tokenizer.text_of(self._window)
        self._held = ""  # what is behind it and may still change
        self._stream: Stream | None = None  # None within a character, and where the library's decoder is of no use

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens of the answer; returns the text that is certain now and was not before.

        Raises:
            CheckpointError: the tokenizer cannot decode them, or its decoder changes text because of what follows it.
                After that, or any other fault, only ``restart`` makes sense.
        """
        with refused_as(CheckpointError, UNDECODABLE, quotes=False):
            return "".join([self._piece(token) for token in token_ids if self._tokenizer.has_text(token)])

    def finish(self) -> str:
        """Returns the rest of the text, when no more tokens come."""
        rest, self._held = self._held, ""
        return rest

    def _piece(self, token: int) -> str:
        """The text that becomes certain by a token that has text."""
        before, self._window = self._window, [*self._window, token]
        piece = self._stream(token) if self._stream is not None else None
        if piece is None:
            self._stream = None
            piece = self._decoded_again(before)
        if self._given is None:
            self._window = self._window[-CONTEXT_TOKENS:]
        elif len(self._window) > 2 * CONTEXT_TOKENS:
            self._window = self._window[-CONTEXT_TOKENS:]
            self._given = _certain(self._tokenizer.text_of(self._window))
        return piece

    def _decoded_again(self, before: list[int]) -> str:
        """The text that becomes certain by the last token of the window, which was ``before`` without it."""
        given = self._tokenizer.text_of(before) if self._given is None else self._given
        text = self._tokenizer.text_of(self._window)
        certain = _certain(text)
        if not certain.startswith(given):
            if text == given:  # the prompt ends within a character, and so does this token
                return ""
            given = _certain(given)  # the prompt's last character has become whole, and is the answer's
            if not certain.startswith(given):
                raise CheckpointError(
                    f"{UNDECODABLE} while it comes: its decoder changes text that was given, because of what follows; "
                    "ask for the answer as a whole, without stop texts"
                )
        self._given, self._held = certain, text[len(certain) :]
        if certain and not self._held:
            self._given, self._stream = None, self._tokenizer.stream_behind(self._window)
        return certain[len(given) :]


def _certain(text: str) -> str:
    """``text`` without what more bytes may change: of a character that is not whole the decoder makes one U+FFFD."""
    return text.removesuffix(_REPLACEMENT)
