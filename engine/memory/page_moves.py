"""Moves of whole pages that the books have decided and the device has still to make.

The manager collects them in order; whoever runs steps makes them in that order, before the next step is dispatched
(``CacheManager.take_moves``). Planning itself never waits for a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from engine.memory.integers import Int32
from engine.memory.offload import Pages
from engine.memory.prefix import EvictedPages


@dataclass(frozen=True, eq=False)
class PageLoad:
    """Pages that come back from the host.

    Attributes:
        pages: int32 ``[n]`` page ids that are written.
        data: ``[n, layers, page_size, 2H, D]``.
    """

    pages: Int32
    data: Pages


@dataclass(frozen=True, eq=False)
class PageCopy:
    """Pages that are copied within the pool: ``sources`` to ``targets``, int32 ``[n]`` each."""

    sources: Int32
    targets: Int32


# EvictedPages are to be read, and put into the host tier; their contents are in place until the next step.
PageMove: TypeAlias = EvictedPages | PageLoad | PageCopy
