"""Who may come in: a rule over the tokens that requests know, may add soon, and can ever need.

For the request that asks and for each that runs, there must be pages for the tokens that it knows and for what it may
add in the next steps, an eighth of a page's tokens, but no more than it can ever need. So nobody who was let in is
short of pages at once, and hardly any page waits for a token that never comes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import RequestTooLarge, ShapeError
from engine.memory.integers import Int64, whole_number
from engine.memory.rows import ReqToTokenPool

# Of a page's tokens: so many steps ahead each running request finds its pages when another is admitted.
LOOKAHEAD_SHARE = 8


@dataclass(frozen=True)
class Admission:
    """What a request got when it was admitted.

    Attributes:
        row: its page-table row, ``req_pool_idx``.
        cached_tokens: tokens whose pages were found on the device.
        loaded_tokens: tokens after them whose pages came back from the host.
    """

    row: int
    cached_tokens: int
    loaded_tokens: int


class AdmissionRule:
    """What is known of the requests in the rows of a page table, and whether another may join them.

    Args:
        page_table: says how many tokens each row has.
        size: token slots of the pool.

    Attributes:
        known: int64 ``[max_requests]`` tokens that each row's request knew when it was admitted; 0: no request.
        most: int64, likewise: the most that it can need.
    """

    def __init__(self, page_table: ReqToTokenPool, size: int) -> None:
        self._page_table = page_table
        self._size = size
        self._page_size = page_table.page_size
        self._lookahead = max(page_table.page_size // LOOKAHEAD_SHARE, 1)
        self.known = np.zeros(page_table.max_requests, np.int64)
        self.most = np.zeros(page_table.max_requests, np.int64)

    def pages_needed(self, known: int, most: int, shared_pages: int) -> int:
        """Pages that must be there for the rule to hold with one more request.

        Args:
            known: tokens that it knows.
            most: most that it can need.
            shared_pages: pages that it need not be given.
        """
        soon = int(self._soon(np.array([known]), np.array([most]))[0])
        return -(-soon // self._page_size) - shared_pages + self._reserved_pages()

    def checked_most(self, known: int, most_tokens: int | None) -> int:
        """The most tokens that a request of ``known`` can have; refuses one that can never be let in.

        Raises:
            ShapeError: no tokens, more than a row can hold, or ``most_tokens`` is not an integer, 1 or more.
            RequestTooLarge: the whole pool is too small.
        """
        context = self._page_table.max_context_tokens
        if not 1 <= known <= context:
            raise ShapeError(f"cannot admit {known} tokens: a request has from 1 to {context}")
        most = context if most_tokens is None else min(whole_number("most_tokens", most_tokens, least=1), context)
        needed = known if most_tokens is None else max(known, most)
        if needed > self._size:
            raise RequestTooLarge(
                f"cannot admit a request that knows {known} tokens and may need {needed}: the whole pool holds "
                f"{self._size}; ask for fewer tokens or raise size",
                requested=-(-needed // self._page_size) * self._page_size,
                available=self._size,
            )
        return min(most, self._size)

    def _reserved_pages(self) -> int:
        """Pages that running requests will need soon by the rule, and do not have yet."""
        rows = np.flatnonzero(self.known).astype(np.int32)
        lens = self._page_table.kv_lens(rows).astype(np.int64)
        soon = self._soon(np.maximum(lens, self.known[rows]), self.most[rows])
        return int((-(-soon // self._page_size) - -(-lens // self._page_size)).sum())

    def _soon(self, known: Int64, most: Int64) -> Int64:
        """How many tokens requests will have soon."""
        return np.maximum(known, np.minimum(known + self._lookahead, most))
