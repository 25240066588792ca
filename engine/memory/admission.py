"""Which requests are admitted: a rule over the tokens that requests know, may add soon, and can ever need.

For the request that asks and for each that runs, there must be pages for the tokens that it knows and for what it may
add in the next steps, an eighth of a page's tokens, but no more than it can ever need. So no admitted request is short
of pages at once, and hardly any page waits for a token that never comes.

In a group with a window a request needs the pages of its window. While it computes what it knows it holds more, by the
tokens that steps under way have been granted; since a step has so many tokens in all, requests share what is kept for
that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from engine.errors import RequestTooLarge, ShapeError
from engine.layer_groups import most_pages_held
from engine.memory.integers import Int64, whole_number
from engine.memory.rows import ReqToTokenPool

# A page's tokens divided by this: for so many steps each running request has its pages when another is admitted.
LOOKAHEAD_DIVISOR = 8
# Tokens of a decoding request that are granted and not computed: those of the step under way and of the next one.
DECODE_AHEAD_TOKENS = 2


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


@dataclass(frozen=True)
class PageDemand:
    """How many pages requests take, over all groups of layers.

    Attributes:
        windows: the window of each group; None is full attention.
        page_size: tokens per page.
        ahead_tokens: the most tokens of a request that are granted and not computed.
    """

    windows: Sequence[int | None]
    page_size: int
    ahead_tokens: int

    @cached_property
    def kinds(self) -> Counter[int | None]:
        """How many groups have each window."""
        return Counter(self.windows)

    def most_pages(self, tokens: int) -> int:
        """The most pages that a request holds at once on its way to so many tokens."""
        return sum(count * self._most_of(window, tokens) for window, count in self.kinds.items())

    def most_tokens(self, pages: int, most: int) -> int:
        """The most tokens, up to ``most``, that a request can have in so many pages."""
        return bisect_right(range(1, most + 1), pages, key=self.most_pages)

    def describe(self, tokens: int) -> str:
        """Its pages by kind of group, such as ``512 of full attention and 5 x 67 of a window of 1,024``."""
        parts = []
        for window, count in self.kinds.items():
            times = f"{count} x " if count > 1 else ""
            kind = "full attention" if window is None else f"a window of {window:,}"
            parts.append(f"{times}{self._most_of(window, tokens):,} of {kind}")
        return " and ".join(parts)

    def _most_of(self, window: int | None, tokens: int) -> int:
        return most_pages_held(window, tokens, self.page_size, self.ahead_tokens)


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
    soon = -(-_soon(np.maximum(lens, known_lens), most_lens, lookahead) // size)
    needed = -(-max(known, min(known + lookahead, most)) // size)
    total = -shared_pages
    for window, count in demand.kinds.items():
        if window is None:
            total += count * (needed + int((soon - -(-lens // size)).sum()))
            continue
        steady = most_pages_held(window, size * needed, size, DECODE_AHEAD_TOKENS)
        held = rows.window_pages_held(demand.windows.index(window))
        reserved = np.minimum(soon, _most_pages(window, size, DECODE_AHEAD_TOKENS)) - held
        short = known_lens > lens
        unknown = int((known_lens - lens)[short].sum()) + known
        ends = np.append(-(-known_lens[short] // size), needed)
        extra = _extra_pages(window, ends, demand).sum()
        shared_extra = -(-min(unknown, demand.ahead_tokens) // size)
        total += count * (steady + int(reserved.clip(min=0).sum()) + min(int(extra), shared_extra))
    return total


def _most_pages(window: int, page_size: int, ahead_tokens: int) -> int:
    """Pages of a window that a long request holds at most."""
    return most_pages_held(window, 2 * (window + ahead_tokens + page_size), page_size, ahead_tokens)


def _extra_pages(window: int, ends: Int64, demand: PageDemand) -> Int64:
    """Pages that requests hold while they compute what they know, ``ends[n]`` pages, beyond those of later steps."""
    size = demand.page_size
    steady, most = (_most_pages(window, size, ahead) for ahead in (DECODE_AHEAD_TOKENS, demand.ahead_tokens))
    extra: Int64 = np.minimum(ends, max(most, steady)) - np.minimum(ends, steady)
    return extra


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
