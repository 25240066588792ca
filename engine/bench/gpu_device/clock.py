"""Device time of a call, measured by the host: the slope of time over the number of programs queued before a wait."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

MOST_PROGRAMS = 96  # a quarter of them stays below the limit of jax's queue


def time_queued(
    dispatch: Callable[[], None],
    wait: Callable[[], object],
    calls: int,
    *,
    seconds: float = 0.15,
    repeats: int = 5,
) -> dict[str, Any]:
    """Times one program on the device.

    The time to start and to end a queue is the same for few programs and for many. So the difference is the device's
    time alone, provided that the host queues faster than the device works.

    Args:
        dispatch: queues one program, which depends on the one before, and returns at once.
        wait: returns when all queued programs are done.
        calls: number of measured calls in each program.
        seconds: approximate time of one measurement.
        repeats: number of measurements.

    Returns:
        ``us``, median microseconds per call; ``low_us`` and ``high_us``, the extremes; ``host_us``, in which the host
        queued a call; ``host_bound``, whether the host was no faster than the device; ``one_us``, of one program from
        dispatch to end.
    """

    def run(programs: int) -> tuple[float, float]:
        start = time.perf_counter()
        for _ in range(programs):
            dispatch()
        queued = time.perf_counter()
        wait()
        return time.perf_counter() - start, (queued - start) / programs

    run(2)  # the first run loads the program and its kernels
    once = min(run(1)[0] for _ in range(3))
    many = min(max(math.ceil(seconds / once), 4), MOST_PROGRAMS)
    few = max(1, many // 4)
    slopes, queueing = [], []
    for _ in range(repeats):
        short, queued = run(few)
        long, _ = run(many)
        slopes.append((long - short) / (many - few) / calls)
        queueing.append(queued / calls)
    us, host_us = median(slopes) * 1e6, median(queueing) * 1e6
    return {
        "us": us,
        "low_us": min(slopes) * 1e6,
        "high_us": max(slopes) * 1e6,
        "host_us": host_us,
        "host_bound": host_us > 0.9 * us,
        "one_us": once / calls * 1e6,
        "calls": calls,
        "programs": many,
    }
