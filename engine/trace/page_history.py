"""Every page of a trace at every step: what changed from each moment to the next, for the page that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.memory.integers import Int32
from engine.memory.page_map import PageMap
from engine.trace.event_text import event_text
from engine.trace.page_code import about_books, code_pages
from engine.trace.player import Player
from engine.trace.replay import Failure, replay
from engine.trace.trace_file import Trace, TraceEvent

MOST_MOMENTS = 20_000
MOST_TEXTS = 40  # of a moment


@dataclass
class ReplicaHistory:
    """One replica's pages through time.

    Attributes:
        about: see ``about_books``.
        now: the pages as they were last looked at, ``[3, n]``.
        changes: of each moment, int32 ``[4, changed]``: page, code, owner, page before.
        counts: of each moment, pages that are free, held, locked and cached.
        owners: the number of the request in each row.
        recorded: the same for rows as the trace has them.
    """

    about: dict[str, Any]
    now: Int32
    changes: list[Int32] = field(default_factory=list)
    counts: list[tuple[int, int, int, int]] = field(default_factory=list)
    owners: dict[int, int] = field(default_factory=dict)
    recorded: dict[int, int] = field(default_factory=dict)


class PageHistory:
    """Looks on while a trace is played, and keeps what changed.

    Args:
        first, last: steps that are shown one by one; those before are shown as one moment, those behind are not.
        stride: only each so many-th step is a moment, with all that happened since the one before.

    Attributes:
        replicas: the pages.
        requests: the requests, in the order in which they got rows: id or None, tenant or None, row.
        steps, micros, waiting, running: of each moment.
        texts: of each moment, what happened.
        failure: why the trace could not be played to its end; None where it could.
    """

    def __init__(self, first: int, last: int, stride: int) -> None:
        self.replicas: list[ReplicaHistory] = []
        self.requests: list[dict[str, Any]] = []
        self.steps: list[int] = []
        self.micros: list[int] = []
        self.waiting: list[int] = []
        self.running: list[int] = []
        self.texts: list[list[str]] = []
        self.failure: Failure | None = None
        self._first, self._last, self._stride = first, last, stride
        self._step = self._micros = self._waiting = 0
        self._happened: list[str] = []
        self._numbers: dict[int, int] = {}  # of requests that were named

    @classmethod
    def of(cls, trace: Trace, *, first: int = 0, last: int | None = None) -> PageHistory:
        """Plays a trace; where it fails, shows what was before.

        Args:
            trace: the trace.
            first: the first step that is shown.
            last: the last one; None is that of the trace.
        """
        steps = [event.asked["step"] for event in trace.events if event.what == "step"]
        end = max(steps, default=0) if last is None else last
        shown = sum(first <= step <= end for step in steps)
        history = cls(first, end, -(-shown // MOST_MOMENTS) or 1)
        history.failure = replay(trace.events, history).failure
        return history

    def note(self, player: Player, event: TraceEvent) -> None:
        """See ``Watcher``."""
        if event.what == "books":
            count = about_books(event.asked)["pages"] + 1
            self.replicas.append(ReplicaHistory(about_books(event.asked), np.zeros((3, count), np.int32)))
            return
        if event.what == "step":
            self._step, self._micros, self._waiting = (event.asked[name] for name in ("step", "us", "waiting"))
            return
        if event.what in ("admit", "fork") and "row" in event.outcome:
            self._add_request(player, event)
        elif event.what == "run":
            self._name_request(player, event)
        replica = self.replicas[event.replica] if event.replica < len(self.replicas) else None
        text = event_text(event, lambda row: self._name_of(event.replica, row)) if replica else None
        if text is not None:
            more = len(self.replicas) > 1
            self._happened.append(f"replica {event.replica}: {text}" if more else text)

    def end_step(self, player: Player) -> None:
        """See ``Watcher``."""
        is_due = self._step >= self._first and (self._step - self._first) % self._stride == 0
        if is_due and self._step <= self._last and self.replicas:
            self._look(player)

    def _look(self, player: Player) -> None:
        running = 0
        for cache, replica in zip(player.books, self.replicas, strict=True):
            pages, rows = PageMap.of(cache), cache.page_table.rows_in_use().tolist()
            now = code_pages(pages, {row: replica.owners.get(row, 0) for row in rows}, player.tenants)
            changed = np.flatnonzero((now != replica.now).any(axis=0)).astype(np.int32)
            replica.changes.append(np.concatenate([changed[None], now[:, changed]]))
            replica.counts.append(pages.counts())
            replica.now = now
            running += len(rows)
        self.steps.append(self._step)
        self.micros.append(self._micros)
        self.waiting.append(self._waiting)
        self.running.append(running)
        hidden = len(self._happened) - MOST_TEXTS
        self.texts.append(self._happened[:MOST_TEXTS] + ([f"and {hidden} more"] if hidden > 0 else []))
        self._happened = []

    def _add_request(self, player: Player, event: TraceEvent) -> None:
        row = player.row(event.replica, event.outcome["row"])
        if row is None:
            return
        tenant = None
        if "scope" in event.asked:
            tenant = player.tenant(event.asked["scope"])
        elif (parent := player.row(event.replica, event.asked["row"])) is not None:
            tenant = self.requests[self.replicas[event.replica].owners[parent] - 1]["tenant"]
        self.requests.append({"id": None, "tenant": tenant, "row": row})
        replica = self.replicas[event.replica]
        replica.owners[row] = replica.recorded[event.outcome["row"]] = len(self.requests)

    def _name_request(self, player: Player, event: TraceEvent) -> None:
        row = player.row(event.replica, event.asked["row"])
        if row is None:
            return
        replica, name = self.replicas[event.replica], event.asked["request"]
        owners = replica.owners
        known = self._numbers.setdefault(name, owners[row])
        if known == owners[row]:
            self.requests[known - 1]["id"] = name
        else:  # it comes back after a retraction
            if owners[row] == len(self.requests):
                self.requests.pop()
            owners[row] = replica.recorded[event.asked["row"]] = known
            self.requests[known - 1]["row"] = row
        self._happened[-1:] = [text.replace(f"row {row} ", f"request {name} ") for text in self._happened[-1:]]

    def _name_of(self, index: int, recorded: int) -> str:
        owner = self.replicas[index].recorded.get(recorded)
        name = self.requests[owner - 1]["id"] if owner else None
        return f"row {recorded}" if name is None else f"request {name}"


def joined_changes(changes: Sequence[Int32]) -> tuple[list[int], Int32]:
    """The changes of all moments side by side, int32 ``[4, all]``, and how many each moment has."""
    sizes = [each.shape[1] for each in changes]
    return sizes, np.concatenate([np.zeros((4, 0), np.int32), *changes], axis=1)
