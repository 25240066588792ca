"""Requests that begin alike and are admitted together: one computes what they share, the others wait for it.

A request that waits has its row and the pages that were cached, and is in no step. When the row that computes has
published the common pages, or is gone, the wait ends: the request shares what is cached, and waits again where another
row computes more of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.memory.integers import Int32
from engine.memory.manager import CacheManager
from engine.memory.scope import CacheScope
from engine.serving.plan.queue import RequestQueue
from engine.serving.request import Request

Place = tuple[CacheScope, bytes]  # a scope, and the tokens up to the end of the first page that a row computes


@dataclass(frozen=True, eq=False)
class Computing:
    """A row that computes its request's tokens.

    Attributes:
        row: the row.
        tokens: all tokens that the request knew when it was admitted, int32 ``[n]``.
        length: tokens up to the end of the first page that it computes.
    """

    row: int
    tokens: Int32
    length: int


@dataclass(frozen=True)
class Wait:
    """A request's wait for a row to compute what both begin with.

    Attributes:
        request: the request that waits.
        row: row of the request that computes.
        generation: generation of that row, which tells whether the request still has it.
        common_tokens: tokens of the whole pages that both begin with.
        counts_hit: whether what the wait brings is a hit of the prefix cache to be counted.
    """

    request: Request
    row: int
    generation: int
    common_tokens: int
    counts_hit: bool


class PrefixWaits:
    """Which rows of one replica compute the beginning of a prompt, and which wait for one of them.

    Args:
        cache: the replica's.
        queue: is told for which request the cache is asked.
    """

    def __init__(self, cache: CacheManager, queue: RequestQueue) -> None:
        self._cache = cache
        self._queue = queue
        self._waits: dict[int, Wait] = {}  # by the row that waits
        self._computing: dict[Place, Computing] = {}
        self._places: dict[int, Place] = {}  # of the rows that compute

    @property
    def rows(self) -> list[int]:
        """The rows that wait."""
        return list(self._waits)

    def enter(self, request: Request, row: int, cached_tokens: int, *, counts_hit: bool) -> bool:
        """Whether a request that has ``cached_tokens`` waits for another row; else it counts as one that computes."""
        tokens = request.tokens(0, request.num_tokens)
        computing, common = self.find(request.scope, tokens, cached_tokens)
        if computing is None:
            self.compute(request.scope, row, tokens, cached_tokens)
            return False
        generation = int(self._cache.page_table.generations(np.array([computing]))[0])
        self._waits[row] = Wait(request, computing, generation, common, counts_hit)
        return True

    def compute(self, scope: CacheScope, row: int, tokens: Int32, granted_tokens: int) -> None:
        """A row computes its tokens after the first ``granted_tokens``."""
        length = granted_tokens + self._cache.page_size
        if not self._cache.shares_prefixes or tokens.size <= length:
            return
        place = scope, tokens[:length].tobytes()
        if place not in self._computing:
            self._computing[place], self._places[row] = Computing(row, tokens, length), place

    def find(self, scope: CacheScope, tokens: Int32, cached_tokens: int) -> tuple[int | None, int]:
        """The row that computes most of these tokens beyond the cached ones; and how many, in whole pages."""
        found, most = None, cached_tokens
        for length in {each.length for each in self._computing.values()}:
            each = self._computing.get((scope, tokens[:length].tobytes()))
            if each is None:
                continue
            common = _common(each.tokens, tokens[:-1]) // self._cache.page_size * self._cache.page_size
            if common > most:
                found, most = each.row, common
        return found, 0 if found is None else most

    def end_waits(self) -> None:
        """Ends the waits for pages that are computed, or will not be."""
        table = self._cache.page_table
        for row, wait in list(self._waits.items()):
            is_there = table.generations(np.array([wait.row]))[0] == wait.generation
            if is_there and table.computed_len(wait.row) < wait.common_tokens:
                continue
            request = wait.request
            self._queue.acting_for = request
            tokens = request.tokens(0, request.num_tokens)
            shared = self._cache.share(row, request.scope, tokens, counts_hit=wait.counts_hit)
            self._queue.acting_for = None
            del self._waits[row]
            if wait.counts_hit:
                request.cached_tokens = (request.cached_tokens or 0) + shared
            self.enter(request, row, table.kv_len(row), counts_hit=wait.counts_hit)

    def has_computed(self, row: int) -> None:
        """A row has computed its prompt: no other begins to wait for it from now on."""
        place = self._places.pop(row, None)
        if place is not None:
            self._computing.pop(place, None)

    def forget(self, row: int) -> None:
        """A row is given back."""
        self._waits.pop(row, None)
        self.has_computed(row)


def _common(a: Int32, b: Int32) -> int:
    """How many tokens two sequences share from the first on."""
    shorter = min(a.size, b.size)
    differs = (a[:shorter] != b[:shorter]).nonzero()[0]
    return int(differs[0]) if differs.size else shorter
