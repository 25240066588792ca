"""How many pages of the heap requests take, over all groups of layers."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.layer_groups import most_pages_held

# Tokens of a decoding request that are granted and not computed: those of the step under way and of the next one.
DECODE_AHEAD_TOKENS = 2


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
        return self._total(tokens, self.ahead_tokens)

    def decoding_pages(self, tokens: int) -> int:
        """The most pages that a request of so many tokens holds while it decodes."""
        return self._total(tokens, DECODE_AHEAD_TOKENS)

    def pages_of(self, requests: int, tokens: int) -> int:
        """Pages that hold every token of so many requests in every group, also what a window has passed."""
        return requests * len(self.windows) * -(-tokens // self.page_size)

    def requests_in(self, pages: int, tokens: int) -> float:
        """How many requests of so many tokens such pages serve at once; below 1 where they do not hold one."""
        beyond = pages - self.most_pages(tokens)
        return pages / self.most_pages(tokens) if beyond < 0 else 1 + beyond / self.decoding_pages(tokens)

    def most_tokens(self, pages: int, most: int) -> int:
        """The most tokens, up to ``most``, that a request can have in so many pages."""
        return bisect_right(range(1, most + 1), pages, key=self.most_pages)

    def describe(self, tokens: int) -> str:
        """Its pages by kind of group, such as ``512 of full attention and 5 x 67 of a window of 1,024``."""
        parts = []
        for window, count in self.kinds.items():
            times = f"{count} x " if count > 1 else ""
            kind = "full attention" if window is None else f"a window of {window:,}"
            parts.append(f"{times}{self.pages_in(window, tokens):,} of {kind}")
        return " and ".join(parts)

    def pages_in(self, window: int | None, tokens: int) -> int:
        """The most pages that a request holds at once in a group with ``window`` on its way to so many tokens."""
        return most_pages_held(window, tokens, self.page_size, self.ahead_tokens)

    def _total(self, tokens: int, ahead: int) -> int:
        return sum(n * most_pages_held(window, tokens, self.page_size, ahead) for window, n in self.kinds.items())
