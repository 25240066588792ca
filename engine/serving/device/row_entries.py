"""What the device must know of a request that adjusts its logits, sent once when it gets a row: chunks of one size.

Whatever the request's length, one compiled program enters a chunk: the first one resets the row. Free of jax.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise
from typing import TypeVar

import numpy as np

from engine.serving.device.parcel import NOWHERE, Int32
from engine.serving.request import Request
from engine.serving.sampling_params import MAX_BIASES

# A token's word is the sum of these: what the rules need to know of the token in one row.
IN_PROMPT, TOO_EARLY, ONCE_IN_ANSWER = 1, 2, 4
CHUNK_TOKENS = 1024
LEAST_REPETITION = 1e-30  # a smaller penalty would be zero for a device that has no smaller numbers

# How the logits of one row are adjusted: fields and their sizes in words, as the device keeps them.
RULES = {
    "free_from": 1,  # the first position at which the tokens may be chosen that are too early before
    "min_p": 1,
    "presence": 1,
    "frequency": 1,
    "repetition": 1,
    "bias_ids": MAX_BIASES,  # NOWHERE in padding, which is behind all others
    "biases": MAX_BIASES,
}
NOT_FLOATS = ("free_from", "bias_ids")
RULE_WORDS = sum(RULES.values())
# row: whose tokens these are; reset: the same in a row's first chunk, else NOWHERE.
CHUNK = {"row": 1, "reset": 1, "rules": RULE_WORDS, "token_ids": CHUNK_TOKENS, "words": CHUNK_TOKENS}
CHUNK_WORDS = sum(CHUNK.values())

Array = TypeVar("Array")  # NumPy's or jax's


def fields_of(packed: Array, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Slices of the last axis of ``packed``, by name."""
    bounds = pairwise(accumulate(sizes.values(), initial=0))
    return {name: packed[..., start:stop] for name, (start, stop) in zip(sizes, bounds, strict=True)}  # type: ignore[index]


def rules_of(packed: Array) -> dict[str, Array]:
    """The fields of ``RULES`` in their dtypes: of int32 ``[..., RULE_WORDS]``, each ``[..., size]``."""
    fields = fields_of(packed, RULES)
    return {name: field if name in NOT_FLOATS else field.view(np.float32) for name, field in fields.items()}  # type: ignore[attr-defined]


def empty_chunk() -> Int32:
    """A chunk that enters nothing, int32 ``[CHUNK_WORDS]``."""
    chunk = np.zeros(CHUNK_WORDS, np.int32)
    fields = fields_of(chunk, CHUNK)
    fields["row"][:] = fields["reset"][:] = NOWHERE
    fields["token_ids"][:] = NOWHERE
    return chunk


def chunks_of(request: Request) -> Iterator[Int32]:
    """The chunks, at least one, that enter a request into the row that it has; int32 ``[CHUNK_WORDS]`` each."""
    row = NOWHERE if request.req_pool_idx is None else request.req_pool_idx
    ids, words = _known_tokens(request)
    for start in range(0, max(ids.size, 1), CHUNK_TOKENS):
        chunk, part = empty_chunk(), slice(start, start + CHUNK_TOKENS)
        fields = fields_of(chunk, CHUNK)
        fields["row"][:] = row
        fields["token_ids"][: ids[part].size], fields["words"][: ids[part].size] = ids[part], words[part]
        if not start:
            fields["reset"][:] = row
            _fill_rules(fields["rules"], request)
        yield chunk


def _fill_rules(packed: Int32, request: Request) -> None:
    params, rules = request.params, rules_of(packed)
    rules["free_from"][:] = len(request.prompt) + params.min_tokens
    rules["min_p"][:] = params.min_p
    rules["presence"][:], rules["frequency"][:] = params.presence_penalty, params.frequency_penalty
    rules["repetition"][:] = max(params.repetition_penalty, LEAST_REPETITION)
    rules["bias_ids"][:] = NOWHERE
    for place, (token, bias) in enumerate(params.biases):
        rules["bias_ids"][place], rules["biases"][place] = token, bias


def _known_tokens(request: Request) -> tuple[Int32, Int32]:
    """Every token that the rules of a request ask about, once, with its word."""
    prompt = np.unique(request.prompt) if request.params.repetition_penalty != 1 else np.empty(0, np.int32)
    parts = [np.asarray(tokens, np.int32) for tokens in (prompt, request.output, sorted(request.too_early))]
    ids = np.concatenate(parts)
    each = np.repeat([IN_PROMPT, ONCE_IN_ANSWER, TOO_EARLY], [part.size for part in parts])
    known, places = np.unique(ids, return_inverse=True)
    return known, np.bincount(places, each, known.size).astype(np.int32)
