"""Makes a failing trace small: the fewest events that still break the books in the same way.

Delta debugging (Zeller and Hildebrandt, "Simplifying and isolating failure-inducing input", 2002), first over whole
requests, then over single events, then over the rows of events that have several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from engine.errors import ConfigError
from engine.trace.player import Player
from engine.trace.replay import BROKEN, DIFFERS, Failure, replay
from engine.trace.resolver import resolved
from engine.trace.trace_file import FRAME, TraceEvent

WITH_ROWS = ("grow", "computed", "leave")
BEGINS_ROW = ("admit", "fork")

T = TypeVar("T")


@dataclass(frozen=True)
class Shrunk:
    """A trace that was made small.

    Attributes:
        failure: the mistake that it shows.
        lines: the lines of the small trace, with what really came of each call.
        events: calls in it, without what they stand on.
        before: calls in the trace up to the mistake.
    """

    failure: Failure
    lines: list[str]
    events: int
    before: int


def shrink(events: Sequence[TraceEvent]) -> Shrunk:
    """Makes a trace small that breaks the books, or makes a call raise.

    Where only a decision is another, it is cut behind that decision: there is nothing to try smaller ones by.

    Raises:
        ConfigError: the trace can be played to its end.
    """
    failure = replay(events).failure
    if failure is None:
        raise ConfigError("the trace can be played to its end, and all books are sound: there is nothing to shrink")
    upto = [event for event in resolved(events) if event.line <= failure.line]
    frame = [event for event in upto if event.what in FRAME]
    calls = [event for event in upto if event.what not in FRAME]
    if failure.kind == DIFFERS or _failure_of(frame, calls) is None:
        lines = replay(event for event in events if event.line <= failure.line).lines
        return Shrunk(failure, lines, len(calls), len(calls))
    search = _Search(frame, failure)
    small = _without_rows(_without_events(_without_requests(calls, search), search), search)
    player = Player(is_whole=False)
    _play(player, _in_order([*_needed(frame, small), *small]))
    return Shrunk(failure, player.lines, len(small), len(calls))


class _Search:
    """Tries parts of a trace."""

    def __init__(self, frame: list[TraceEvent], failure: Failure) -> None:
        self._frame, self._wanted = frame, failure.signature

    def fails(self, calls: Iterable[TraceEvent]) -> bool:
        """Whether a part shows the mistake, and not another one."""
        found = _failure_of(self._frame, calls)
        return found is not None and found.signature == self._wanted


def _failure_of(frame: list[TraceEvent], calls: Iterable[TraceEvent]) -> Failure | None:
    """The mistake that a part of a trace shows; the books are looked at once, at its end."""
    player, last = Player(is_whole=False), TraceEvent("", 0, {}, {})
    try:
        for last in _in_order([*frame, *calls]):
            player.play(last)
    except ConfigError:
        return None
    except Exception as error:
        return Failure("raised", last.what, last.line, 0, f"{type(error).__name__}: {error}")
    try:
        player.check()
    except Exception as error:
        is_told = type(error).__name__ == "IntegrityError"
        return Failure(BROKEN, last.what, last.line, 0, str(error) if is_told else f"{type(error).__name__}: {error}")
    return None


def _play(player: Player, events: Iterable[TraceEvent]) -> None:
    for event in events:
        try:
            player.play(event)
        except ConfigError:
            raise
        except Exception:  # the mistake that is looked for
            return


def _without_requests(calls: list[TraceEvent], search: _Search) -> list[TraceEvent]:
    """Leaves out whole requests: every call for a row from its beginning to its end."""
    lives = _lives(calls)
    numbers = sorted({number for of_event in lives for number in of_event})

    def part(kept: Sequence[int]) -> list[TraceEvent]:
        chosen = set(kept)
        parts = []
        for event, mine in zip(calls, lives, strict=True):
            if event.what in WITH_ROWS:
                event = _with_rows(event, [index for index, life in enumerate(mine) if life in chosen])
            if not mine or chosen & set(mine):
                parts.append(event)
        return parts

    return part(_fewest(numbers, lambda kept: search.fails(part(kept))))


def _without_events(calls: list[TraceEvent], search: _Search) -> list[TraceEvent]:
    return list(_fewest(calls, search.fails))


def _without_rows(calls: list[TraceEvent], search: _Search) -> list[TraceEvent]:
    """Leaves out rows of events that have several."""
    small = list(calls)
    for at, event in enumerate(calls):
        if event.what not in WITH_ROWS or event.asked["rows"].size < 2:
            continue

        def with_part(kept: Sequence[int], at: int = at, event: TraceEvent = event) -> list[TraceEvent]:
            return [*small[:at], _with_rows(event, kept), *small[at + 1 :]]

        kept = _fewest(range(event.asked["rows"].size), lambda part: search.fails(with_part(part)))
        small[at] = _with_rows(event, kept)
    return small


def _lives(calls: list[TraceEvent]) -> list[tuple[int, ...]]:
    """For each call, the requests that it is for, numbered by the calls that gave them rows; () where for none."""
    current: dict[tuple[int, int], int] = {}
    found: list[tuple[int, ...]] = []
    for number, event in enumerate(calls):
        asked, replica = event.asked, event.replica
        rows = asked["rows"].tolist() if event.what in WITH_ROWS else [asked["row"]] if "row" in asked else []
        mine = tuple(current.get((replica, row), -1) for row in rows)
        if event.what in BEGINS_ROW:  # a fork goes with the one that it begins
            mine = (number,)
            if "row" in event.outcome:
                current[replica, event.outcome["row"]] = number
        found.append(mine)
    return found


def _with_rows(event: TraceEvent, kept: Sequence[int]) -> TraceEvent:
    """An event for some of its rows."""
    index = np.array(kept, np.int64)
    asked: dict[str, Any] = dict(event.asked)
    for name in ("rows", "counts", "tokens"):
        if isinstance(value := asked.get(name), np.ndarray):
            asked[name] = value[index]
    return replace(event, asked=asked)


def _needed(frame: list[TraceEvent], calls: Iterable[TraceEvent]) -> list[TraceEvent]:
    """What calls stand on: books and tier, and the scopes that they name."""
    scopes = {event.asked["scope"] for event in calls if "scope" in event.asked}
    return [event for event in frame if event.what != "scope" or event.asked["scope"] in scopes]


def _in_order(events: list[TraceEvent]) -> list[TraceEvent]:
    return sorted(events, key=lambda event: event.line)


def _fewest(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> Sequence[T]:
    """A part of ``items`` that fails and of which no single one can be left out (the ddmin of the paper)."""
    pieces = 2
    while len(items) >= 2:
        size = -(-len(items) // pieces)
        starts = range(0, len(items), size)
        for start in starts:
            rest = [*items[:start], *items[start + size :]]
            if fails(rest):
                items, pieces = rest, max(pieces - 1, 2)
                break
        else:
            if size == 1:
                break
            pieces = min(2 * pieces, len(items))
    if len(items) == 1 and fails([]):
        return []
    return items
