"""Sessions that take turns: how much of what each has said before is still cached when its turn comes again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.bench.groups_designs import PAGE_SIZE, STEP_TOKENS, WINDOW, WINDOWED_GROUPS
from engine.bench.groups_load import Engine
from engine.memory.integers import Int32
from engine.memory.manager import CacheManager

QUESTION, ANSWER = 512, 32  # tokens that a turn adds
OCCUPANCY = 0.25
WINDOW_PAGES = -(-(WINDOW - 1) // PAGE_SIZE)  # whole pages before a page border that the next token sees


@dataclass(frozen=True)
class RoundRobin:
    """Sessions whose pages of full attention and last windows fill a share of the memory at their last turn.

    Attributes:
        sessions: how many.
        context: tokens of each before its first turn.
        rounds: turns of each after the first, in which nothing can be cached.
        goes_on: whether a turn goes on after the last answer; else each puts another question to the same context.
    """

    sessions: int
    context: int
    rounds: int
    goes_on: bool

    @classmethod
    def filling(cls, units: int, context: int, rounds: int, *, goes_on: bool) -> RoundRobin:
        """As many sessions as fill ``OCCUPANCY`` of ``units``, two at least."""
        one = cls(1, context, rounds, goes_on)
        return cls(max(2, int(OCCUPANCY * units) // one.needed_units), context, rounds, goes_on)

    @property
    def longest(self) -> int:
        """Tokens of a session at its last turn."""
        return self.context + (QUESTION + ANSWER) * (self.rounds + 1 if self.goes_on else 1)

    @property
    def needed_units(self) -> int:
        """Pages of full attention and last windows of all sessions at their last turn."""
        return self.sessions * (-(-self.longest // PAGE_SIZE) + WINDOWED_GROUPS * (WINDOW_PAGES + 1))


def hit_rates(robin: RoundRobin, units: int, seed: int = 0) -> list[float]:
    """Of each round, the share of the whole pages computed before that the real prefix cache has.

    Args:
        robin: the sessions.
        units: pages of the heap.
        seed: of the tokens.
    """
    windows = (None, *[WINDOW] * WINDOWED_GROUPS)
    cache = CacheManager(units * PAGE_SIZE, PAGE_SIZE, 1, robin.longest, windows=windows, ahead_tokens=STEP_TOKENS)
    engine, rng = Engine(cache, 1), np.random.default_rng(seed)

    def words(count: int) -> Int32:
        return rng.integers(0, 2**31 - 1, count).astype(np.int32)

    said, rates = [words(robin.context) for _ in range(robin.sessions)], []
    for turn in range(robin.rounds + 1):
        cached = known = 0
        for session, history in enumerate(said):
            request = engine.add(np.concatenate([history, words(QUESTION)]), ANSWER)
            while not engine.commit(engine.plan()):
                pass
            cached += (request.cached_tokens or 0) // PAGE_SIZE
            known += _known_pages(robin, turn)
            if robin.goes_on:
                said[session] = request.tokens(0, request.num_tokens)
        rates.append(cached / known)
    cache.check_integrity()
    return rates[1:]


class LruWindows:
    """The rival's cache of window pages: those of all computed tokens enter it, and the least recently used leave.

    A sequence is found up to a page if the window's pages before that one are all here. Finding it is a use of each
    page from its beginning on, as in a radix tree whose nodes are used with their parents.

    Args:
        capacity: pages, at least those of a window.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._pages: OrderedDict[Hashable, None] = OrderedDict()  # the least recently used first

    def find(self, path: Sequence[Hashable]) -> int:
        """How many of a sequence's pages need not be computed again; a use of them."""
        found = len(path)
        while found and not all(page in self._pages for page in path[max(0, found - WINDOW_PAGES) : found]):
            found -= 1
        for page in path[:found]:
            if page in self._pages:
                self._pages.move_to_end(page)
        return found

    def compute(self, pages: Sequence[Hashable]) -> None:
        """Takes in pages, in this order."""
        for page in pages:
            self._pages[page] = None
            self._pages.move_to_end(page)
            if len(self._pages) > self.capacity:
                self._pages.popitem(last=False)


def rival_hit_rates(robin: RoundRobin, units: int) -> list[float]:
    """The same for a fixed split, whose half for full attention holds all sessions: what its windows let be found."""
    cache, rates = LruWindows(units // 2 // WINDOWED_GROUPS), []
    for turn in range(robin.rounds + 1):
        known, found = _known_pages(robin, turn), 0
        end = robin.context + (QUESTION + ANSWER) * (turn + 1 if robin.goes_on else 1) - 1
        for session in range(robin.sessions):
            path: list[Hashable] = [(session, place) for place in range(known)]
            of_turn = () if robin.goes_on else (turn,)  # what follows the context is never seen again
            path += [(session, place, *of_turn) for place in range(known, end // PAGE_SIZE)]
            here = cache.find(path[:known])
            cache.compute(path[here:])
            found += here
        rates.append(found / (known * robin.sessions))
    return rates[1:]


def _known_pages(robin: RoundRobin, turn: int) -> int:
    """Whole pages of a session that were computed before a turn; of its context, at the first."""
    # The last token of an answer is never fed.
    said = turn * (QUESTION + ANSWER) - 1 if robin.goes_on and turn else 0
    return (robin.context + said) // PAGE_SIZE
