"""Between the pool and the host tier: the control plane says which pages, a mover carries the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.errors import ConfigError
from engine.memory.integers import Int32
from engine.memory.offload.host_tier import HostTier
from engine.memory.offload.page_format import Pages
from engine.memory.prefix.match import EvictedPages


class PageMover(Protocol):
    """Copies pages of the pool; what the device does stays behind it, so that this room needs no jax."""

    def read(self, pages: Int32) -> Pages:
        """Page ids ``[n]`` to ``[n, layers, page_size, 2H, D]`` on the host."""

    def write(self, pages: Int32, data: Pages) -> None:
        """The way back, in place."""

    def copy(self, sources: Int32, targets: Int32) -> None:
        """From page to page of the pool, in place."""


@dataclass(frozen=True)
class HostPages:
    """A host tier and who moves its pages.

    Raises:
        ConfigError: not a tier, or nothing that can move pages.
    """

    tier: HostTier
    mover: PageMover

    def __post_init__(self) -> None:
        can_move = all(callable(getattr(self.mover, move, None)) for move in ("read", "write", "copy"))
        if not isinstance(self.tier, HostTier) or not can_move:
            raise ConfigError(
                f"cannot join a {type(self.tier).__name__} and a {type(self.mover).__name__}: they must be a HostTier "
                "and a PageMover, which has read, write and copy"
            )

    def save(self, evicted: list[EvictedPages]) -> None:
        """Takes in pages whose contents are about to be given up; one read for all of them."""
        data = self.mover.read(np.concatenate([part.pages for part in evicted]))
        start = 0
        for part in evicted:
            self.tier.put(part.scope, part.token_ids, part.first_page, data[start : start + part.pages.size])
            start += part.pages.size
