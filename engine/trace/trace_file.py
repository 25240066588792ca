"""Reads a trace and checks its form; see ``recorder`` for what it is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.trace.recorder import FORMAT, VERSION

# What each line is asked for, besides its replica: names that must be there.
ASKED: dict[str, tuple[str, ...]] = {
    "books": (
        *("size", "page_size", "max_requests", "max_context_tokens"),
        *("policy", "windows", "ahead_tokens"),
    ),
    "tier": ("pages",),
    "scope": ("scope", "model", "epoch", "adapter", "tenant", "layout"),
    "step": ("step", "us", "waiting"),
    "admit": ("scope", "tokens", "most", "priority", "counts"),
    "share": ("row", "scope", "tokens", "counts"),
    "grow": (),
    "truncate": ("row", "tokens"),
    "computed": ("rows", "tokens"),
    "leave": ("rows",),
    "publish": ("row", "scope", "tokens"),
    "fork": ("row", "tokens"),
    "release": ("row", "scope", "tokens"),
    "moves": (),
    "reset": (),
    "epoch": ("model", "epoch"),
    "clear": (),
    "store": ("scope", "tokens", "first", "group"),
    "run": ("request", "row", "scope"),
    "retract": ("request",),
    "end": ("request",),
    "restart": (),
    "cut": ("why",),
}
FRAME = ("books", "tier", "scope")  # what the rest stands on
REMEDY = "make it by --record, and leave its lines as they are"


@dataclass(frozen=True)
class TraceEvent:
    """A line of a trace.

    Attributes:
        what: the kind of event, one of ``ASKED``.
        replica: whose books.
        asked: what the call was asked.
        outcome: what came of it.
        line: its place in the file, from 1.
    """

    what: str
    replica: int
    asked: dict[str, Any]
    outcome: dict[str, Any]
    line: int = 0

    @property
    def error(self) -> str | None:
        """The name of the error that the call raised."""
        error = self.outcome.get("error")
        return None if error is None else str(error)


@dataclass(frozen=True)
class Trace:
    """A trace.

    Attributes:
        header: what the file says of itself.
        events: its lines.
    """

    header: dict[str, Any]
    events: list[TraceEvent]


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Reads a trace. A last line that a crash has left unfinished is dropped.

    Raises:
        ConfigError: the file cannot be read, is no trace of this version, or a line is wrong; the message says which.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no trace: it is not UTF-8; {REMEDY}") from error
    header, *lines = text.split("\n")[:-1] or ["{}"]
    about = _loaded(header, f"{path}, line 1")
    if not isinstance(about, dict) or (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        raise ConfigError(f"{path} is no {FORMAT} of version {VERSION}; {REMEDY}")
    return Trace(about, parse_events(lines, str(path), first_line=2))


def parse_events(lines: Iterable[str], name: str = "a trace", *, first_line: int = 1) -> list[TraceEvent]:
    """The events of lines; raises ConfigError where one is wrong."""
    return [_event(line, f"{name}, line {number}", number) for number, line in enumerate(lines, first_line)]


def write_trace(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Writes a trace that was recorded in memory; raises ConfigError where it cannot be written."""
    try:
        with open(path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise ConfigError(f"cannot write the trace {path}: {error.strerror}; check the path") from error


def _event(line: str, where: str, number: int) -> TraceEvent:
    parts = _loaded(line, where)
    if not isinstance(parts, list) or [type(part) for part in parts] != [str, int, dict, dict]:
        raise ConfigError(f"{where}: {line!r:.60} is not [what, replica, asked, outcome]; {REMEDY}")
    what, replica, asked, outcome = parts
    if what not in ASKED:
        raise ConfigError(f"{where}: {what!r:.40} is no kind of event; a newer version may have written it")
    if missing := [name for name in ASKED[what] if name not in asked]:
        raise ConfigError(f"{where}: {what} lacks {', '.join(missing)}; {REMEDY}")
    return TraceEvent(what, replica, asked, outcome, number)


def _loaded(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {line!r:.60} is not JSON: {error}; {REMEDY}") from error
