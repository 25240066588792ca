"""What happened in a step, in the words of a person."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.trace.trace_file import TraceEvent


def event_text(event: TraceEvent, name_of: Callable[[int], str]) -> str | None:
    """A line for an event; None for what is not worth one.

    Args:
        event: a resolved event.
        name_of: what the request in a row is called.
    """
    make = _TEXTS.get(event.what)
    if make is None:
        return None
    text = make(event, event.asked, event.outcome, name_of)
    if event.error is not None:
        text += f": {event.error}"
    if evicted := event.outcome.get("evicted"):
        text += f"; {_pages(evicted)} evicted"
    return text


def _admit(event: TraceEvent, asked: Any, outcome: Any, name_of: Callable[[int], str]) -> str:
    tokens = asked["tokens"].size
    if "row" not in outcome:
        return f"a request of {tokens:,} tokens waits for room"
    loaded = f", {outcome['loaded']:,} loaded from the host" if outcome["loaded"] else ""
    return f"{name_of(outcome['row'])} is admitted: {outcome['cached']:,} of {tokens:,} tokens cached{loaded}"


def _grow(event: TraceEvent, asked: Any, outcome: Any, name_of: Callable[[int], str]) -> str:
    rows, counts = asked["rows"], asked["counts"]
    total = counts * rows.size if isinstance(counts, int) else int(counts.sum())
    who = name_of(int(rows[0])) if rows.size == 1 else f"{rows.size:,} requests"
    if "pages" not in outcome:
        return f"{who}: room for {_tokens(total)} more"
    pages = outcome["pages"]
    taken = len(pages) if isinstance(pages, list) else len(pages) * 3 // 16
    return f"{who}: {_tokens(total)} more, {_pages(taken)} taken"


def _of_row(verb: str) -> Callable[..., str]:
    def text(event: TraceEvent, asked: Any, outcome: Any, name_of: Callable[[int], str]) -> str:
        return f"{name_of(asked['row'])} {verb}"

    return text


def _requests(verb: str) -> Callable[..., str]:
    def text(event: TraceEvent, asked: Any, outcome: Any, name_of: Callable[[int], str]) -> str:
        reason = f" ({asked['reason']})" if "reason" in asked else ""
        return f"request {asked['request']} {verb}{reason}"

    return text


def _moves(event: TraceEvent, asked: Any, outcome: Any, name_of: Callable[[int], str]) -> str:
    return "page moves: " + ", ".join(f"{count:,} {name}" for name, count in outcome.items() if count)


_TEXTS: dict[str, Callable[..., str]] = {
    "admit": _admit,
    "grow": _grow,
    "share": _of_row("shares what was cached meanwhile"),
    "truncate": lambda event, asked, outcome, name_of: f"{name_of(asked['row'])} is cut to {_tokens(asked['tokens'])}",
    "publish": _of_row("publishes its full pages"),
    "fork": lambda event, asked, outcome, name_of: f"{name_of(asked['row'])} is forked at {_tokens(asked['tokens'])}",
    "release": _of_row("gives its row back"),
    "moves": _moves,
    "reset": lambda *_: "the prefix cache is reset",
    "epoch": lambda event, asked, *_: f"the weights are replaced: epoch {asked['epoch']}",
    "clear": lambda *_: "the books are cleared",
    "store": lambda event, asked, outcome, name_of: f"{_pages(outcome.get('stored', 0))} stored on the host",
    "retract": _requests("is retracted"),
    "end": _requests("ends"),
    "restart": lambda *_: "a step failed: every request waits again",
    "cut": lambda *_: "the trace was cut here",
}


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count != 1)}"


def _pages(count: int) -> str:
    return f"{count:,} page{'s' * (count != 1)}"
