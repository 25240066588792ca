"""When the request in each row got its last token, for the time between tokens; no plan depends on it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from engine.memory.integers import Int32
from engine.serving.request import RequestTimes


class TokenTimes:
    """Times by row, in seconds of a clock that the caller reads; NaN where the row's request has no token.

    A step that repeats the one before it costs a subtraction, whatever its number of rows: all of them got a token in
    both steps. Their times are entered row by row only when another step has run, or a row comes or goes.

    Args:
        rows: number of rows.
    """

    def __init__(self, rows: int) -> None:
        self._at = np.full(rows, math.nan)
        self._latest = math.nan  # the time of the last step that was noted
        self._repeated: Int32 | None = None  # rows of which `_at` does not say yet that it is their time

    def enter(self, row: int, times: RequestTimes) -> None:
        """Takes over the time of a request that has got ``row``."""
        self._settle()
        self._at[row] = times.last_token

    def leave(self, row: int, times: RequestTimes) -> None:
        """Gives the time back to a request that loses ``row`` and will get another one."""
        self._settle()
        times.last_token = float(self._at[row])

    def note_repeat(self, rows: Int32, now: float) -> float:
        """Notes tokens for the rows that got one in the step noted before; returns the seconds since then."""
        gap = now - self._latest
        self._repeated, self._latest = rows, now
        return gap

    def note(self, rows: Int32, now: float) -> npt.NDArray[np.float64]:
        """Notes tokens for any rows; returns for each the seconds since its last one, NaN where this is the first."""
        self._settle()
        gaps: npt.NDArray[np.float64] = now - self._at[rows]
        self._at[rows] = now
        self._latest = now
        return gaps

    def _settle(self) -> None:
        if self._repeated is not None:
            self._at[self._repeated] = self._latest
            self._repeated = None
