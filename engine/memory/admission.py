"""Which requests are admitted: a rule over the tokens that requests know, may add soon, and can ever need.

For the request that asks and for each that runs, there must be pages for the tokens that it knows and for what it may
add in the next steps, an eighth of a page's tokens, but no more than it can ever need. So no admitted request is short
of pages at once, and hardly any page waits for a token that never comes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import RequestTooLarge, ShapeError
from engine.memory.integers import Int64, whole_number
from engine.memory.rows import ReqToTokenPool

# A page's tokens divided by this: for so many steps each running request has its pages when another is admitted.
LOOKAHEAD_DIVISOR = 8


@dataclass(frozen=True)
class Admission:
    """What a request got when it was admitted.

    Attributes:
        row: its page-table row, ``req_pool_idx``.
        cached_tokens: tokens whose pages were found on the device.
        loaded_tokens: tokens after them whose pages a page move loads from the host before the next step.
    """

    row: int
    cached_tokens: int
    loaded_tokens: int


def pages_to_admit(rows: ReqToTokenPool, known: int, most: int, shared_pages: int) -> int:
    """Pages that must be free or evictable for the rule to hold with one more request.

    Args:
        rows: the running requests.
        known: tokens that the request knows.
        most: most tokens that it can need.
        shared_pages: pages that it shares and need not allocate.
    """
    lens, known_lens, most_lens = rows.request_lens()
    size, lookahead = rows.page_size, max(rows.page_size // LOOKAHEAD_DIVISOR, 1)
    soon = _soon(np.maximum(lens, known_lens), most_lens, lookahead)
    reserved = int((-(-soon // size) - -(-lens // size)).sum())
    return -(-max(known, min(known + lookahead, most)) // size) - shared_pages + reserved


def _soon(known: Int64, most: Int64, lookahead: int) -> Int64:
    """How many tokens requests will have soon."""
    return np.maximum(known, np.minimum(known + lookahead, most))


def checked_most(rows: ReqToTokenPool, size: int, known: int, most_tokens: int | None) -> int:
    """The most tokens that a request can have in a pool of ``size``; refuses one that can never be admitted.

    Raises:
        ShapeError: no tokens, more than a row can hold, or ``most_tokens`` is not an integer, 1 or more.
        RequestTooLarge: the whole pool is too small.
    """
    context = rows.max_context_tokens
    if not 1 <= known <= context:
        raise ShapeError(f"cannot admit {known} tokens: a request has from 1 to {context}")
    most = context if most_tokens is None else min(whole_number("most_tokens", most_tokens, least=1), context)
    needed = known if most_tokens is None else max(known, most)
    if needed > size:
        raise RequestTooLarge(
            f"cannot admit a request that knows {known} tokens and may need {needed}: the whole pool holds {size}; "
            "ask for fewer tokens or raise size",
            requested=-(-needed // rows.page_size) * rows.page_size,
            available=size,
        )
    return min(most, size)
