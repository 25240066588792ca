"""What a trace is made of, in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.trace.trace_file import TraceEvent


@dataclass
class TraceStats:
    """The figures of a trace.

    Attributes:
        calls: events by kind.
        errors: calls that raised, by kind and error.
        steps: steps that have begun.
        seconds: from the first step to the last.
        requests: distinct requests that got a row.
        refused: admissions for which there was no room.
        cached_tokens, asked_tokens: of admissions, the tokens found on the device and all tokens.
        evicted_pages, loads, saves, copies: pages, and page moves.
        most_held: of each replica, the most pages that were neither free nor evictable when a step began.
        most_waiting: the most requests that waited when a step began.
        pages: pages of each replica.
    """

    calls: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    seconds: float = 0.0
    requests: int = 0
    refused: int = 0
    cached_tokens: int = 0
    asked_tokens: int = 0
    evicted_pages: int = 0
    loads: int = 0
    saves: int = 0
    copies: int = 0
    most_held: list[int] = field(default_factory=list)
    most_waiting: int = 0
    pages: list[int] = field(default_factory=list)

    def describe(self) -> str:
        """Some lines for a person."""
        rows = {
            "steps": f"{self.steps:,} in {self.seconds:,.2f} s, by {len(self.pages)} replicas",
            "requests": f"{self.requests:,}, {self.calls['retract']:,} retractions, up to {self.most_waiting:,} waited",
            "admissions": f"{self.calls['admit'] - self.refused:,}, {self.refused:,} times there was no room",
            "prefix cache": f"{self.cached_tokens:,} of {self.asked_tokens:,} admitted tokens found, "
            f"{self.evicted_pages:,} pages evicted",
            "page moves": f"{self.saves:,} saves, {self.loads:,} loads, {self.copies:,} copies",
            "pages": "; ".join(
                f"at most {most:,} of {pages:,} held" for most, pages in zip(self.most_held, self.pages, strict=True)
            ),
            "calls": ", ".join(f"{count:,} {name}" for name, count in self.calls.most_common()),
            "raised": ", ".join(f"{count:,} {name}" for name, count in self.errors.most_common()) or "nothing",
        }
        return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


def count_trace(events: Iterable[TraceEvent]) -> TraceStats:
    """Counts the events of a trace."""
    stats, requests, begun = TraceStats(), set[int](), None
    for event in events:
        stats.calls[event.what] += 1
        stats.evicted_pages += event.outcome.get("evicted", 0)
        if event.error is not None:
            stats.errors[f"{event.error} in {event.what}"] += 1
        elif event.what == "books":
            stats.pages.append(event.asked["size"] // event.asked["page_size"])
            stats.most_held.append(0)
        elif event.what == "step":
            begun = event.asked["us"] if begun is None else begun
            stats.seconds = (event.asked["us"] - begun) / 1e6
            _count_step(stats, event)
        elif event.what == "admit":
            _count_admission(stats, event)
        elif event.what == "moves":
            stats.saves += event.outcome["saves"]
            stats.loads += event.outcome["loads"]
            stats.copies += event.outcome["copies"]
        elif event.what == "run":
            requests.add(event.asked["request"])
    stats.requests = len(requests)
    return stats


def _count_step(stats: TraceStats, event: TraceEvent) -> None:
    stats.steps += 1
    stats.most_waiting = max(stats.most_waiting, event.asked["waiting"])
    for index, (free, evictable) in enumerate(zip(event.outcome["free"], event.outcome["evictable"], strict=True)):
        stats.most_held[index] = max(stats.most_held[index], stats.pages[index] - free - evictable)


def _count_admission(stats: TraceStats, event: TraceEvent) -> None:
    if "row" not in event.outcome:
        stats.refused += 1
        return
    stats.cached_tokens += event.outcome["cached"]
    stats.asked_tokens += event.asked["tokens"][0]
