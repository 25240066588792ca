"""Plays a whole trace on fresh books: after every step they must be sound, and every decision must come out again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from engine.errors import ConfigError, IntegrityError
from engine.trace.player import Player
from engine.trace.resolver import resolved
from engine.trace.trace_file import TraceEvent

BROKEN, RAISED, DIFFERS = "broken", "raised", "differs"


@dataclass(frozen=True)
class Failure:
    """Why a trace cannot be played to its end.

    Attributes:
        kind: BROKEN: the books are not sound; RAISED: a call raised what it did not raise before, or what no caller is
            to see; DIFFERS: another decision.
        what: the kind of the last event that was played.
        line: its line.
        step: the step that it is in.
        message: what is wrong.
    """

    kind: str
    what: str
    line: int
    step: int
    message: str

    @property
    def signature(self) -> tuple[str, str]:
        """What is the same wherever this mistake shows: the kind, and the message without its numbers."""
        return self.kind, re.sub(r"\d+", "#", self.message)[:80]

    def describe(self) -> str:
        """In one line."""
        how = {BROKEN: "the books are broken", RAISED: "a call raised", DIFFERS: "another decision"}[self.kind]
        return f"step {self.step}, line {self.line}, after {self.what}: {how}: {self.message}"


@dataclass(frozen=True)
class Replay:
    """What came of playing a trace.

    Attributes:
        events: events that were played.
        steps: steps that have begun.
        skipped: calls that were left out, since a fault had broken off an earlier one.
        is_exact: whether all decisions were compared: there was no fault.
        failure: None where all is well.
        lines: the trace as it came out.
    """

    events: int
    steps: int
    skipped: int
    is_exact: bool
    failure: Failure | None
    lines: list[str]


class Watcher(Protocol):
    """Looks on while a trace is played."""

    def note(self, player: Player, event: TraceEvent) -> None:
        """An event has been played."""

    def end_step(self, player: Player) -> None:
        """All events of a step have been, or those before the first step; the books are sound."""


def replay(events: Iterable[TraceEvent], watcher: Watcher | None = None) -> Replay:
    """Plays a whole trace and checks it.

    Args:
        events: the events, as they were read.
        watcher: looks on.

    Raises:
        ConfigError: the trace is wrong.
    """
    return _Run(Player(), watcher).play(resolved(events))


class _Run:
    def __init__(self, player: Player, watcher: Watcher | None) -> None:
        self.player, self.watcher = player, watcher
        self.last: TraceEvent | None = None
        self.events = self.steps = self.step = 0

    def play(self, events: Iterable[TraceEvent]) -> Replay:
        """Plays events to the end or to the first failure."""
        failure = None
        for event in events:
            if event.what == "step":
                failure = self._end_step()
                self.steps, self.step = self.steps + 1, event.asked["step"]
            failure = failure or self._play(event)
            if failure:
                break
        failure = failure or self._end_step()
        player = self.player
        return Replay(self.events, self.steps, player.skipped, player.is_exact, failure, player.lines)

    def _play(self, event: TraceEvent) -> Failure | None:
        self.last = event
        self.events += 1
        try:
            played = self.player.play(event)
        except ConfigError:
            raise
        except Exception as error:  # whatever is wrong with the books
            return self._failure(RAISED, f"{type(error).__name__}: {error}")
        if self.watcher is not None:
            self.watcher.note(self.player, event)
        if not self.player.is_exact or event.what == "cut":
            return None
        if played is None or played.outcome != event.outcome:
            here = "nothing" if played is None else played.outcome
            return self._failure(DIFFERS, f"the trace has {event.outcome} and the books say {here}")
        return None

    def _end_step(self) -> Failure | None:
        try:
            self.player.check()
        except IntegrityError as error:
            return self._failure(BROKEN, str(error))
        except Exception as error:  # books so broken that they cannot be checked
            return self._failure(BROKEN, f"{type(error).__name__}: {error}")
        if self.watcher is not None:
            self.watcher.end_step(self.player)
        return None

    def _failure(self, kind: str, message: str) -> Failure:
        what, line = (self.last.what, self.last.line) if self.last else ("nothing", 0)
        return Failure(kind, what, line, self.step, message)
