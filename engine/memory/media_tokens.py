"""Tokens by which prompts with images, audio or other media are cached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from engine.errors import ShapeError
from engine.memory.integers import Int32
from engine.memory.prefix.match import token_vector

# With 31 bits a token: fewer could be made to agree by one who tries contents at random.
LEAST_TOKENS = 4


def media_tokens(token_ids: Int32, media: Iterable[tuple[int, int, bytes]]) -> Int32:
    """Gives the placeholders of media ids of their own, for the prefix cache alone.

    A model's tokenizer stands the same placeholder for every image, so two prompts with different images would share
    cached pages. Here each placeholder gets a negative id, which no text has, by a hash of the medium's content and of
    the placeholder's place in it (SHAKE-256). Pass these ids to every call of ``CacheManager`` in place of the
    prompt's, and the prompt's own to the model.

    Args:
        token_ids: the prompt, int32 ``[n]``.
        media: for each medium its first placeholder, their number, and bytes that determine what the model is given
            for them: the content, or a cryptographic digest of it, with whatever changes its encoding.

    Returns:
        The ids for the cache, int32 ``[n]``, a copy.

    Raises:
        ShapeError: a medium is not within the prompt, overlaps the one before it, has fewer than 4 placeholders, or
            its content is empty.
    """
    ids, end = token_vector(token_ids).copy(), 0
    for first, count, content in media:
        if first < end or first + count > len(ids):
            raise ShapeError(
                f"a medium of {count} tokens from token {first} does not lie in the {len(ids)} tokens of the prompt "
                f"behind the one that ends at {end}; give them in order, without overlap"
            )
        if count < LEAST_TOKENS or not content:
            raise ShapeError(
                f"a medium of {count} tokens and {len(content)} bytes cannot be told from others: it needs "
                f"{LEAST_TOKENS} tokens and a content; put its digest into CacheScope.tenant_salt instead"
            )
        digest = hashlib.shake_256(content).digest(4 * count)
        ids[first : first + count] = np.frombuffer(digest, "<i4") | np.int32(-(2**31))
        end = first + count
    return ids
