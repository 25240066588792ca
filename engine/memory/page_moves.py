"""Moves of whole pages that are booked already and that the device has yet to make.

The manager collects them in order, and the engine makes them in that order, before it dispatches the next step
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
    """Pages that are loaded from the host.

    Attributes:
        pages: int32 ``[n]`` ids of the pages that are written.
        data: ``[n, layers, page_size, 2H, D]`` their contents.
    """

    pages: Int32
    data: Pages


@dataclass(frozen=True, eq=False)
class PageCopy:
    """Pages that are copied within the pool: ``sources`` to ``targets``, int32 ``[n]`` each."""

    sources: Int32
    targets: Int32


# For EvictedPages the engine reads the pages into the host tier; their contents are valid until the next step.
PageMove: TypeAlias = EvictedPages | PageLoad | PageCopy
