"""Side-by-side timing: the machines are noisy, so what is quoted is the median of ratios taken in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Timings:
    """Seconds a call of one contender, one entry a round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return median(self.seconds)


def time_in_turn(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int = 15, calls: int = 1, warmup: int = 2
) -> dict[str, Timings]:
    """Times each contender once a round, in turn, so that drift of the machine hits all of them alike.

    Args:
        contenders: name to a callable that does the work and returns when it is done.
        rounds: measured rounds.
        calls: calls a round, timed as one and divided.
        warmup: calls of each before the first round.

    Returns:
        The timings under the same names, in seconds a call.
    """
    for call in contenders.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(calls):
                call()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: Timings(name, tuple(values)) for name, values in seconds.items()}


def median_ratio(slow: Timings, fast: Timings) -> float:
    """Median over the rounds of ``slow / fast``: how many times as fast the second is."""
    return median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a plain aligned table: first column left, the rest right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
