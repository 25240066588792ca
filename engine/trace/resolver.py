"""Makes each event of a trace stand alone: what it says by what was said before is written out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from engine.errors import ConfigError
from engine.memory.integers import Int32
from engine.trace.integer_lists import unpack
from engine.trace.page_digests import PageNumbers
from engine.trace.trace_file import TraceEvent

WITH_SEQUENCE = ("admit", "share", "publish", "release", "store")


def resolved(events: Iterable[TraceEvent]) -> Iterator[TraceEvent]:
    """The events, with whole sequences of tokens and rows as int32 vectors.

    Of a ``grow`` also the counts, a number or a vector. Tokens are made up: see ``PageNumbers``.

    Raises:
        ConfigError: an event refers to what was not said before.
    """
    resolver = _Resolver()
    for event in events:
        try:
            yield resolver.resolve(event)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"line {event.line} of the trace cannot be understood: {error!r}") from error


class _Resolver:
    def __init__(self) -> None:
        self._numbers: PageNumbers | None = None
        self._grown: dict[int, Int32] = {}

    def resolve(self, event: TraceEvent) -> TraceEvent:
        """One event; those before it have been."""
        if event.what == "books":
            self._numbers = self._numbers or PageNumbers(event.asked["page_size"])
        asked = self._with_vectors(event)
        if self._numbers is not None and "row" in event.outcome:
            if event.what == "admit":
                self._numbers.rename((event.replica, "waiting"), (event.replica, event.outcome["row"]))
            elif event.what == "fork":
                parent, child = (event.replica, asked["row"]), (event.replica, event.outcome["row"])
                self._numbers.rename(parent, child, asked["tokens"])
        return event if asked is event.asked else replace(event, asked=asked)

    def _with_vectors(self, event: TraceEvent) -> dict[str, Any]:
        asked = event.asked
        if event.what in WITH_SEQUENCE:
            if self._numbers is None:
                raise ConfigError(f"line {event.line} of the trace has tokens before there are books")
            name = "tier" if event.what == "store" else (event.replica, asked.get("row", "waiting"))
            return asked | {"tokens": self._numbers.read(name, asked["tokens"])}
        if event.what == "grow":
            if "rows" in asked:
                self._grown[event.replica] = unpack(asked["rows"])
            counts = asked.get("counts", 1)
            counts = counts if isinstance(counts, int) else unpack(counts)
            return {"rows": self._grown.get(event.replica, np.empty(0, np.int32)), "counts": counts}
        if event.what == "computed":
            return {"rows": unpack(asked["rows"]), "tokens": unpack(asked["tokens"])}
        if event.what == "leave":
            return {"rows": unpack(asked["rows"])}
        return asked
