"""Makes the page moves that a plan has decided, in their order, between the programs of two steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from engine.kv.page_copy import PageRead
from engine.memory.offload.host_tier import HostTier
from engine.memory.page_moves import PageCopy, PageLoad, PageMove
from engine.memory.prefix.match import EvictedPages
from engine.serving.device.runner import ModelRunner


class PageMover:
    """Moves pages within the pool, and between it and the host tier, without waiting for the device.

    Args:
        runner: holds the pool.
        tier: takes the evicted pages; None where there is none.
    """

    def __init__(self, runner: ModelRunner, tier: HostTier | None) -> None:
        self._runner = runner
        self._tier = tier
        self._saves: deque[tuple[PageRead, list[EvictedPages]]] = deque()  # on their way to the host
        self.started = 0  # saves, ever
        self._landed = 0

    def make(self, moves: Sequence[tuple[int, PageMove]]) -> None:
        """Starts all moves in order, each with the index of its replica; saves of a replica in a row are one read."""
        for (replica, _), group in groupby(moves, key=lambda move: (move[0], type(move[1]))):
            self._start(replica, [move for _, move in group])

    def land(self, started: int | None = None) -> None:
        """Puts pages that were saved into the tier: those among the first ``started`` saves, None is all."""
        while self._tier and self._saves and (started is None or self._landed < started):
            read, parts = self._saves[0]
            data, start = read.wait(), 0
            for part in parts:
                saved = data[start : start + part.pages.size]
                self._tier.put(part.scope, part.token_ids, part.first_page, saved, part.group)
                start += part.pages.size
            self._saves.popleft()
            self._landed += 1

    def forget(self) -> None:
        """Drops the pages that are on their way to the tier."""
        self._landed += len(self._saves)
        self._saves.clear()

    def _start(self, replica: int, moves: list[PageMove]) -> None:
        saves = [move for move in moves if isinstance(move, EvictedPages)]
        if saves:
            pages = np.concatenate([move.pages for move in saves])
            self._saves.append((self._runner.start_reading(pages, replica=replica), saves))
            self.started += 1
        for move in moves:
            if isinstance(move, PageLoad):
                self._runner.write(move.pages, move.data, replica=replica)
            elif isinstance(move, PageCopy):
                self._runner.copy(move.sources, move.targets, replica=replica)
