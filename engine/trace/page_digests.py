"""Token ids in a trace: a keyed digest of each whole page, so that equal pages are seen to be equal and nothing else.

The prefix cache compares tokens by whole pages, so a trace whose pages are equal where those of the run were repeats
every match. The key is drawn for each trace and never written: from a digest nobody finds the tokens, not even by
trying all of them.

A sequence is written by what it adds to one that was written before under the same name, such as a row's.
"""

from __future__ import annotations

import secrets
from base64 import b64decode, b64encode
from collections.abc import Hashable
from hashlib import blake2b
from typing import Any

import numpy as np

from engine.errors import ConfigError
from engine.memory.integers import Int32

DIGEST_BYTES = 8
NO_TOKENS = np.empty(0, np.int32)

Written = list[Any]  # [tokens in all, whole pages that are as before, the digests of the others in base64]


class PageDigests:
    """Writes sequences of tokens.

    Args:
        page_size: tokens per page.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._key = secrets.token_bytes(32)
        self._last: dict[Hashable, Int32] = {}

    def write(self, name: Hashable, tokens: Int32) -> Written:
        """A sequence as what it adds to the last one of this name, which it becomes."""
        size = self._page_size
        whole, before = tokens.size // size, self._last.get(name, NO_TOKENS)
        kept = min(before.size, tokens.size) // size
        differs = before[: kept * size] != tokens[: kept * size]
        if differs.any():
            kept = int(differs.argmax()) // size
        self._last[name] = tokens[: whole * size].copy()
        data, step = tokens[kept * size : whole * size].tobytes(), 4 * size
        pages = (data[at : at + step] for at in range(0, len(data), step))
        added = b"".join([blake2b(page, key=self._key, digest_size=DIGEST_BYTES).digest() for page in pages])
        return [tokens.size, kept, b64encode(added).decode()]

    def rename(self, name: Hashable, other: Hashable, tokens: int | None = None) -> None:
        """Lets ``other`` go on from what ``name`` has, or from its first ``tokens``; ``name`` keeps it."""
        last = self._last.get(name, NO_TOKENS)
        self._last[other] = last if tokens is None else last[:tokens]

    def forget(self, name: Hashable) -> None:
        """Forgets a sequence that does not go on."""
        self._last.pop(name, None)


class PageNumbers:
    """Reads what ``PageDigests`` wrote: makes up tokens whose pages are equal where those of the run were.

    Args:
        page_size: tokens per page.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._numbers: dict[bytes, int] = {}
        self._last: dict[Hashable, Int32] = {}  # the number of each page

    def read(self, name: Hashable, written: Written) -> Int32:
        """The tokens, int32 ``[n]``: the first of each page says which page it is, the others are 0.

        Raises:
            ConfigError: the sequence is not one that was written.
        """
        try:
            count, kept, text = written
            added = b64decode(text, validate=True)
            pieces = [added[at : at + DIGEST_BYTES] for at in range(0, len(added), DIGEST_BYTES)]
            numbers = [self._numbers.setdefault(piece, len(self._numbers) + 1) for piece in pieces]
            before = self._last.get(name, NO_TOKENS)
            pages = np.concatenate([before[:kept], np.array(numbers, np.int32)])
            if not 0 <= kept <= before.size or pages.size != count // self._page_size:
                raise ValueError(f"{pages.size} pages of {self._page_size} tokens are not those of {count} tokens")
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the tokens {written!r:.60} of a trace are wrong: {error}") from error
        self._last[name] = pages
        tokens = np.zeros(count, np.int32)
        tokens[: pages.size * self._page_size : self._page_size] = pages
        return tokens

    def rename(self, name: Hashable, other: Hashable, tokens: int | None = None) -> None:
        """As there."""
        last = self._last.get(name, NO_TOKENS)
        self._last[other] = last if tokens is None else last[: tokens // self._page_size]
