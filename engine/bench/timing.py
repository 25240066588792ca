"""Times contenders in one run: machines are noisy, so reports give the median of ratios from one run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Timings:
    """Seconds per call of one contender, one entry per round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return median(self.seconds)


def time_in_turn(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int = 15, calls: int = 1, warmup: int = 2
) -> dict[str, Timings]:
    """Times each contender once per round, in turn, so that changes of the machine's speed affect all alike.

    Args:
        contenders: callables by name; each does its work and returns when it is done.
        rounds: measured rounds.
        calls: calls per round, timed together and divided.
        warmup: calls of each contender before the first round.

    Returns:
        The timings under the same names, in seconds per call.
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
    """Median over the rounds of ``slow / fast``: how many times as fast as ``slow`` the contender ``fast`` is."""
    return median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def median_and_interval(values: npt.ArrayLike) -> tuple[float, float, float]:
    """The median of some measurements, and the ends of its 95 % interval (bootstrap, 2,000 draws)."""
    measured = np.asarray(values)
    draws = np.random.default_rng(0).integers(0, measured.size, (2_000, measured.size))
    low, high = np.percentile(np.median(measured[draws], axis=1), [2.5, 97.5])
    return float(np.median(measured)), float(low), float(high)


def timed(seconds: list[float], call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call; appends the seconds that it takes."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return wrapper


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replaces an attribute of an object by ``value`` while the block runs."""
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a plain table: the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
