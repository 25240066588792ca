"""Histograms: how many values lay below each of some bounds, and their sum."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class HistogramSnapshot:
    """A histogram at one moment.

    Attributes:
        bounds: upper bounds, ascending; a bucket contains its bound.
        counts: values in each bucket, and after them those above the last bound.
        sum: sum of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self.counts)


class Histogram:
    """Counts values by fixed bounds; only the thread that drives the engine may call it.

    Args:
        bounds: see ``HistogramSnapshot``.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._bound_array = np.array(bounds, np.float64)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value so many times. NaN is not counted: the time from or to a moment that there was not."""
        if value == value:
            self._counts[bisect_left(self._bounds, value)] += times
            self._sum += value * times

    def observe_all(self, values: npt.NDArray[np.float64]) -> None:
        """Counts values ``[n]`` without NaN."""
        added = np.bincount(self._bound_array.searchsorted(values), minlength=len(self._counts))
        self._counts = list(map(add, self._counts, added.tolist()))
        self._sum += float(values.sum())

    def snapshot(self) -> HistogramSnapshot:
        """What has been counted so far."""
        return HistogramSnapshot(self._bounds, tuple(self._counts), self._sum)
