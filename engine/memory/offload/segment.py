"""Consecutive pages of one prefix, as the host tier hands them out and a store keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from engine.memory.offload.page_format import Int32, Pages
from engine.memory.scope import CacheScope


@dataclass(frozen=True)
class PrefixSegment:
    """Pages and the tokens that they stand for.

    Attributes:
        scope: whose prefix it is.
        token_ids: int32, from the start of the sequence to the end of the last page.
        first_page: how many pages of the prefix come before ``data``.
        data: ``[n, layers, page_size, 2H, D]``.
    """

    scope: CacheScope
    token_ids: Int32
    first_page: int
    data: Pages
