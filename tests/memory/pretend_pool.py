"""A pool of pages on the host, which makes the moves that a manager plans."""

import numpy as np

from engine.memory.page_moves import PageCopy, PageLoad


class PretendPool:
    def __init__(self, cache, page_shape, dtype):
        self.cache = cache
        self.content = np.zeros((cache.size // cache.page_size + 1, *page_shape), dtype)
        self.largest_read = 0

    def make_moves(self):
        """Makes every planned move, in order; returns them."""
        moves = self.cache.take_moves()
        for move in moves:
            if isinstance(move, PageLoad):
                self.content[move.pages] = move.data
            elif isinstance(move, PageCopy):
                self.content[move.targets] = self.content[move.sources]
            else:
                self.cache.host_tier.put(move.scope, move.token_ids, move.first_page, self.content[move.pages])
        return moves

    def read(self, pages):
        self.largest_read = max(self.largest_read, len(pages))
        return self.content[pages]

    def run_step(self, row, tokens):
        """A step that computes a row up to ``tokens``, and the moves before it."""
        self.make_moves()
        self.cache.mark_computed([row], [tokens])
