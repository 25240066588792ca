"""What becomes cached and what is lost, for others who route requests to where their beginnings are cached."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

from engine.memory.integers import Int32, read_only
from engine.memory.scope import CacheScope


@dataclass(frozen=True, eq=False)
class PagesCached:
    """Pages that requests of a scope find from now on.

    Attributes:
        scope: the scope.
        parent_page: the cached page whose tokens come before; 0 where the tokens begin a sequence.
        token_ids: int32 ``[n * page_size]``, the tokens of the pages themselves.
        pages: int32 ``[n]``, in the order of the tokens.
    """

    scope: CacheScope
    parent_page: int
    token_ids: Int32
    pages: Int32


@dataclass(frozen=True, eq=False)
class PagesLost:
    """Pages, int32 ``[n]``, that nobody finds any more; some may never have been told of, which changes nothing."""

    pages: Int32


@dataclass(frozen=True)
class PrefixesForgotten:
    """All pages of a scope are lost, or of a model's weights before an epoch, or all there are.

    Attributes:
        scope: the scope, or None.
        model: the model, or None.
        weights_epoch: the first epoch of that model that is not concerned.
    """

    scope: CacheScope | None = None
    model: str | None = None
    weights_epoch: int = 0


@dataclass(frozen=True)
class EventsMissed:
    """Nobody took the events for too long, and they were dropped: begin again from ``RadixCache.runs``."""


CacheEvent: TypeAlias = PagesCached | PagesLost | PrefixesForgotten | EventsMissed


class CacheEvents:
    """The events since they were last taken, in order.

    Args:
        most: how many are kept; where there are more, all are replaced by one EventsMissed.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._events: deque[CacheEvent] = deque()
        self._is_missed = False

    def cached(self, scope: CacheScope, parent_page: int, token_ids: Int32, pages: Int32) -> None:
        """Notes pages that were cached."""
        self._note(PagesCached(scope, parent_page, read_only(token_ids.copy()), read_only(pages.copy())))

    def lost(self, pages: Int32) -> None:
        """Notes pages that have left the cache."""
        try:
            self._note(PagesLost(read_only(pages.copy())))
        except BaseException:
            self._is_missed = True  # they have left all the same
            raise

    def forgotten(self, event: PrefixesForgotten) -> None:
        """Notes that much was forgotten at once."""
        self._note(event)

    def take(self) -> list[CacheEvent]:
        """The events since the last call."""
        events, is_missed = self._events, self._is_missed
        self._events, self._is_missed = deque(), False
        return [EventsMissed()] if is_missed else list(events)

    def _note(self, event: CacheEvent) -> None:
        if len(self._events) == self._most:
            self._is_missed = True
            self._events.clear()
        if not self._is_missed:
            self._events.append(event)
