"""What single tokens spell, in bytes: one token may be part of a character, which no text can say."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.models.text import Tokenizer


class TokenBytes:
    """The bytes of each token of a tokenizer.

    Args:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._backend = tokenizer, (backend := tokenizer.backend)
        self._added = backend.get_added_tokens_decoder()
        is_byte_level = backend.decoder is not None and backend.decoder.decode(["Ġ"]) == " "
        self._byte_of = byte_alphabet() if is_byte_level else {}

    def of(self, token_id: int) -> bytes:
        """What a token spells in the middle of a text; a special token spells its name, an unknown one nothing."""
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        name = self._backend.id_to_token(token_id)
        if name is None:
            return b""
        if self._byte_of.keys() >= set(name) and self._byte_of:
            return bytes(self._byte_of[character] for character in name)
        if (byte := self._tokenizer.byte_of(token_id)) is not None:
            return bytes((byte,))
        alone = self._backend.decode([token_id])
        # After another token, because the beginning of a text may lose its first space.
        return str(self._backend.decode([token_id, token_id])[len(alone) :]).encode()


def byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: the byte's own where it prints, else one of those from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
