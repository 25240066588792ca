"""Which requests are admitted: a rule over the tokens that requests know, may add soon, and can ever need.

For the request that asks and for each that runs, there must be pages for the tokens that it knows and for what it may
add in the next steps, an eighth of a page's tokens, but no more than it can ever need. So no admitted request is short
of pages at once, and hardly any page waits for a token that never comes.

In a group with a window a request needs the pages of its window. While it computes what it knows it holds more, by the
tokens that steps under way have been granted; since a step has so many tokens in all, requests share what is kept for
that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.errors import RequestTooLarge, ShapeError
from engine.layer_groups import most_pages_held
from engine.memory.integers import Int64, whole_number
from engine.memory.rows import ReqToTokenPool
from engine.planning.page_demand import DECODE_AHEAD_TOKENS, PageDemand

# A page's tokens divided by this: for so many steps each running request has its pages when another is admitted.
LOOKAHEAD_DIVISOR = 8


@dataclass(frozen=True)
class Admission:
    """What a request got when it was admitted.

    Attributes:
        row: its page-table row, ``req_pool_idx``.
        cached_tokens: tokens whose pages were found on the device.
        loaded_tokens: tokens after them for which a page move loads pages from the host before the next step.
    """

    row: int
    cached_tokens: int
    loaded_tokens: int


def pages_to_admit(rows: ReqToTokenPool, demand: PageDemand, known: int, most: int, shared_pages: int) -> int:
    """Pages that must be free or evictable for the rule to hold with one more request.

    Args:
        rows: the running requests.
        demand: what requests take.
        known: tokens that the request knows.
        most: most tokens that it can need.
        shared_pages: pages that it shares and need not allocate, over all groups.
    """
    lens, known_lens, most_lens = rows.request_lens()
    size, lookahead = rows.page_size, max(rows.page_size // LOOKAHEAD_DIVISOR, 1)
    fresh = -(-_soon(np.maximum(lens, known_lens), most_lens, lookahead) // size) - -(-lens // size)
    needed = -(-max(known, min(known + lookahead, most)) // size)
    total = -shared_pages
    for window, count in demand.kinds.items():
        if window is None:
            total += count * (needed + int(fresh.sum()))
            continue
        held = np.append(rows.window_pages_held(demand.windows.index(window)), 0)
        unknown = np.append((known_lens - lens).clip(min=0), known)
        total += count * _window_pages(window, demand, np.append(fresh, needed), held, unknown)
    return total


def _window_pages(window: int, demand: PageDemand, fresh: Int64, held: Int64, unknown: Int64) -> int:
    """Pages that requests may take in one group with a window.

    Args:
        window: the window.
        demand: what requests take.
        fresh: ``[n]`` pages that they begin soon; what leaves meanwhile is not counted on.
        held: ``[n]`` pages that they hold.
        unknown: ``[n]`` tokens that they know and have not been granted; 0 while they decode.
    """
    size, is_decoding = demand.page_size, unknown == 0
    most = _most_pages(window, size, demand.ahead_tokens)
    steady = min(_most_pages(window, size, DECODE_AHEAD_TOKENS), most)
    taken = np.minimum(fresh, (most - held).clip(min=0))
    steadily = np.where(is_decoding, taken, np.minimum(taken, (steady - held).clip(min=0)))
    # Beyond that it takes pages for the tokens of its chunks, and the chunks of all steps under way have so many.
    chunks = -(-min(int(unknown.sum()), demand.ahead_tokens) // size) + int(np.count_nonzero(~is_decoding))
    return int(steadily.sum()) + min(int((taken - steadily).sum()), chunks)


def _most_pages(window: int, page_size: int, ahead_tokens: int) -> int:
    """Pages of a window that a long request holds at most."""
    return most_pages_held(window, 2 * (window + ahead_tokens + page_size), page_size, ahead_tokens)


def _soon(known: Int64, most: Int64, lookahead: int) -> Int64:
    """How many tokens requests will have soon."""
    return np.maximum(known, np.minimum(known + lookahead, most))


def checked_most(
    rows: ReqToTokenPool, demand: PageDemand, size: int, known: int, most_tokens: npt.ArrayLike | None
) -> int:
    """The most tokens that a request can have in a pool of ``size`` slots; refuses one that can never be admitted.

    Raises:
        ShapeError: no tokens, more than a row can hold, or ``most_tokens`` is not an integer, 1 or more.
        RequestTooLarge: the whole pool is too small.
    """
    context, pages = rows.max_context_tokens, size // rows.page_size
    if not 1 <= known <= context:
        raise ShapeError(f"cannot admit {known} tokens: a request has from 1 to {context}")
    most = context if most_tokens is None else min(whole_number("most_tokens", most_tokens, least=1), context)  # type: ignore[arg-type]
    needed = known if most_tokens is None else max(known, most)
    if (needed_pages := demand.most_pages(needed)) > pages:
        several = "" if len(demand.windows) == 1 else f" in {needed_pages} pages, {demand.describe(needed)}"
        raise RequestTooLarge(
            f"cannot admit a request that knows {known} tokens and may need {needed}{several}: the whole pool holds "
            f"{size}{'' if not several else f' in {pages} pages'}; ask for fewer tokens or raise size",
            requested=needed_pages * rows.page_size,
            available=size,
        )
    return most if demand.most_pages(most) <= pages else demand.most_tokens(pages, most)
