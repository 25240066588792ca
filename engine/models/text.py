"""Text to token ids and back, by the ``tokenizer.json`` of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from engine.errors import CheckpointError

TOKENIZER_FILE = "tokenizer.json"


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        backend: the parsed ``tokenizer.json``.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, begun as the checkpoint's post-processor says (usually with bos)."""
        return list(self._backend.encode(text).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ``token_ids``.

        Special tokens are left out. Bytes that are not UTF-8, such as the first half of a character whose other half
        has not been generated yet, become U+FFFD.
        """
        return str(self._backend.decode(list(token_ids), skip_special_tokens=True))


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """Read ``tokenizer.json`` of a checkpoint folder.

    Args:
        directory: the folder.

    Returns:
        The tokenizer, or None where the folder has none: such a model is served by token ids alone.

    Raises:
        CheckpointError: the file is not a tokenizer.
    """
    path = Path(directory) / TOKENIZER_FILE
    if not path.is_file():
        return None
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception, whatever is wrong
        raise CheckpointError(f"cannot read {path}: {error}; restore the file as it was published") from error
