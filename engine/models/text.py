"""Text to token ids and back, by a checkpoint's ``tokenizer.json`` and ``tokenizer_config.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders

from engine.errors import CheckpointError, EngineError, RequestError, shown
from engine.models.tensor_files import read_json

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
UNDECODABLE = "the tokenizer cannot decode the answer"
# Last tokens of a text that those behind it are decoded with: a character has at most 4 bytes, a token at least one.
CONTEXT_TOKENS = 8
# Characters beyond which a text is encoded by the call of the library that lets other threads run meanwhile.
LONG_TEXT = 2_000

Stream = Callable[[int], str | None]


@dataclass(frozen=True)
class TextEnds:
    """The tokens around a text, as ``tokenizer_config.json`` names them.

    Attributes:
        bos: id of the token that begins a text, or None.
        eos: id of the token that ends a text, or None.
        add_bos: whether to begin a text with ``bos``; None leaves it to the post-processor of ``tokenizer.json``.
        add_eos: whether to end a text with ``eos``; None as above.
    """

    bos: int | None = None
    eos: int | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        backend: the parsed ``tokenizer.json``; its truncation and padding are switched off.
        ends: the tokens around a text.
        parse_special_tokens: whether the name of a special token in a text becomes that token; otherwise it is plain
            text, so that a user's words cannot end or begin a turn.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, ends: TextEnds | None = None, *, parse_special_tokens: bool = True
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = not parse_special_tokens
        self._backend = backend
        self._ends = ends or TextEnds()
        self._special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
        self._byte_of = _byte_tokens(backend)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The parsed ``tokenizer.json``."""
        return self._backend

    def is_special(self, token: int) -> bool:
        """Whether a token is left out of texts."""
        return token in self._special

    def byte_of(self, token: int) -> int | None:
        """The single byte that a token stands for, such as ``<0x41>`` where the decoder takes it for one; else None."""
        return self._byte_of.get(token)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The token that ends a text, where ``tokenizer_config.json`` names one."""
        return frozenset() if self._ends.eos is None else frozenset((self._ends.eos,))

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of ``text`` with the tokens that the checkpoint puts around it (usually a bos).

        ``add_bos_token`` and ``add_eos_token`` of ``tokenizer_config.json`` override the post-processor of
        ``tokenizer.json``. A token that the text itself begins or ends with, as chat templates do, is not added again.

        Raises:
            RequestError: the tokenizer cannot encode the text.
        """
        with refused_as(RequestError, "the tokenizer cannot encode the prompt"):
            long = len(text) > LONG_TEXT
            encoding = self._backend.encode_batch_fast([text])[0] if long else self._backend.encode(text)
        ids, added = list(encoding.ids), encoding.special_tokens_mask
        begin = next((at for at, mark in enumerate(added) if not mark), len(ids))
        end = next((at for at in range(len(ids), begin, -1) if not added[at - 1]), begin)
        head = _with_or_without(ids[:begin], self._ends.bos, self._ends.add_bos)
        tail = _with_or_without(ids[end:], self._ends.eos, self._ends.add_eos)
        body = ids[begin:end]
        if head and body[:1] == head[-1:]:
            head.pop()
        if tail and body[-1:] == tail[:1]:
            tail.pop(0)
        return head + body + tail

    def decode(self, token_ids: Sequence[int], *, prompt: Sequence[int] | npt.NDArray[np.int32] = ()) -> str:
        """Returns the text that ``token_ids`` add to the text of ``prompt``.

        Special tokens are left out. Bytes that are not UTF-8, such as the first half of a character whose other half
        has not been generated yet, become U+FFFD. A character whose first half ends the prompt is, whole, part of the
        result.

        Args:
            token_ids: the tokens to decode.
            prompt: the tokens before them, of which only the last few matter.

        Raises:
            CheckpointError: the tokenizer cannot decode the tokens.
        """
        context = self.context_of(prompt)
        before, text = self.text_of(context), self.text_of([*context, *token_ids])
        while not text.startswith(before):
            before = before[:-1]
        return text[len(before) :]

    def has_text(self, token: int) -> bool:
        """Whether a token is part of a text: special tokens are not, nor ids that the vocabulary lacks."""
        return token not in self._special and self._backend.id_to_token(token) is not None

    def context_of(self, prompt: Sequence[int] | npt.NDArray[np.int32]) -> list[int]:
        """The last ``CONTEXT_TOKENS`` tokens of ``prompt`` that have text: what follows depends on no other."""
        backwards = (int(prompt[at]) for at in range(len(prompt) - 1, -1, -1))
        return list(islice(filter(self.has_text, backwards), CONTEXT_TOKENS))[::-1]

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Returns the text of ``token_ids`` where they begin a text; raises as ``decode``."""
        with refused_as(CheckpointError, UNDECODABLE, quotes=False):
            if not self._byte_of or self._byte_of.keys().isdisjoint(token_ids):
                return str(self._backend.decode(list(token_ids), skip_special_tokens=True))
            return "".join(self._pieces(list(filter(self.has_text, token_ids))))

    def stream_behind(self, token_ids: Sequence[int]) -> Stream | None:
        """The library's incremental decoder, to go on behind ``token_ids``, which have text and end no half character.

        It takes tokens with text that stand for no single byte, and returns the text that each adds. It returns None
        for one that ends in the middle of a character, and takes none after that.

        Returns:
            The decoder; None behind a token that stands for a single byte.
        """
        whole = list(takewhile(lambda token: token not in self._byte_of, reversed(token_ids)))[::-1]
        if not whole:
            return None
        stream = decoders.DecodeStream(whole, skip_special_tokens=True)
        return lambda token: None if token in self._byte_of else stream.step(self._backend, token)

    def _pieces(self, token_ids: list[int]) -> Iterator[str]:
        """The text in pieces: a byte token is its byte, wherever it stands, which the library does not ensure.

        It replaces a whole run of byte tokens if one byte of it is wrong, and takes a space that a byte spells for one
        that begins the text.
        """
        for at, (is_bytes, run) in enumerate(groupby(token_ids, self._byte_of.__contains__)):
            tokens = list(run)
            if is_bytes:
                yield bytes(self._byte_of[token] for token in tokens).decode(errors="replace")
            elif at == 0:
                yield self._backend.decode(tokens)
            else:  # decoded after another token, because the beginning of a text may lose its first space
                yield self._backend.decode([tokens[0], *tokens])[len(self._backend.decode(tokens[:1])) :]


def load_tokenizer(directory: str | Path, *, parse_special_tokens: bool = True) -> Tokenizer | None:
    """Reads ``tokenizer.json`` of a checkpoint folder, and ``tokenizer_config.json`` where there is one.

    Args:
        directory: the folder.
        parse_special_tokens: see `Tokenizer`.

    Returns:
        The tokenizer, or None where the folder has none: such a model is served by token ids alone.

    Raises:
        CheckpointError: ``tokenizer.json`` is not a tokenizer, or a value of ``tokenizer_config.json`` is wrong.
    """
    path = Path(directory) / TOKENIZER_FILE
    if not path.is_file():
        return None
    with refused_as(CheckpointError, f"cannot read {path}; restore the file as it was published"):
        backend = tokenizers.Tokenizer.from_file(str(path))
    ends = _text_ends(Path(directory) / TOKENIZER_CONFIG_FILE, backend)
    return Tokenizer(backend, ends, parse_special_tokens=parse_special_tokens)


@contextmanager
def refused_as(kind: type[EngineError], what: str, *, quotes: bool = True) -> Iterator[None]:
    """Turns whatever the tokenizer library raises into ``kind``; the engine's own errors stay what they are.

    Args:
        kind: of the error.
        what: what it says.
        quotes: whether it says what the library says; that may have an answer in it, which is not for a log.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, EngineError):
        raise
    except BaseException as error:  # a panic of the library is not an Exception
        raise kind(f"{what}: {error if quotes else type(error).__name__}") from error


def _with_or_without(ids: list[int], token: int | None, wanted: bool | None) -> list[int]:
    """``ids``, which the post-processor puts at one end of a text, with ``token`` or without it as ``wanted``."""
    if token is None or wanted is None or (token in ids) == wanted:
        return ids
    return [*ids, token] if wanted else [other for other in ids if other != token]


def _byte_tokens(backend: tokenizers.Tokenizer) -> dict[int, int]:
    """Maps tokens to the single bytes that they stand for, of characters that the vocabulary lacks."""
    names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    found = {backend.token_to_id(name): byte for byte, name in names.items()}
    return {
        token: byte for token, byte in found.items() if token is not None and backend.decode([token]) != names[byte]
    }


def _text_ends(path: Path, backend: tokenizers.Tokenizer) -> TextEnds:
    if not path.is_file():
        return TextEnds()
    values = read_json(path)
    bos, eos = (_token_id(path, key, values, backend) for key in ("bos_token", "eos_token"))
    add_bos, add_eos = (_switch(path, key, values) for key in ("add_bos_token", "add_eos_token"))
    return TextEnds(bos, eos, add_bos, add_eos)


def _switch(path: Path, key: str, values: dict[str, Any]) -> bool | None:
    value = values.get(key)
    if not isinstance(value, bool | None):
        raise CheckpointError(f"{path} has {key}={shown(value)}, which must be true or false; restore the file")
    return value


def _token_id(path: Path, key: str, values: dict[str, Any], backend: tokenizers.Tokenizer) -> int | None:
    """The id of a token that is named by its text, or by a table with its text; None where the vocabulary lacks it.

    Some published checkpoints name tokens that their vocabulary lacks, which can be neither fed nor generated.
    """
    value = values.get(key)
    name = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(name, str):
        raise CheckpointError(f"{path} has {key}={shown(value)}, which must be the text of a token; restore the file")
    return None if name is None else backend.token_to_id(name)
