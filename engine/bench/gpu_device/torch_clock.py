"""Device time of torch calls, by events around replays of a captured graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any


def torch_device() -> str:
    """The GPU, or the CPU where there is none."""
    import torch  # here, because the import takes seconds and only some workers need it

    return "cuda" if torch.cuda.is_available() else "cpu"


def time_torch(calls: Sequence[Callable[[], Any]], *, seconds: float = 0.15, repeats: int = 5) -> dict[str, Any]:
    """Times calls that do the same over different data, one after the other.

    Args:
        calls: the calls to time.
        seconds: approximate time of one measurement.
        repeats: number of measurements.

    Returns:
        ``us``, median microseconds per call; ``low_us`` and ``high_us``, the extremes; ``graph``, whether one was
        replayed.
    """
    import torch

    for call in calls:
        call()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for call in calls:
            call()
        us = (time.perf_counter() - start) / len(calls) * 1e6
        return {"us": us, "low_us": us, "high_us": us, "graph": False}
    torch.cuda.synchronize()
    play, captured = _captured(calls)

    def run(rounds: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(rounds):
            play()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) * 1e3 / rounds / len(calls)

    rounds = min(max(int(seconds * 1e6 / max(run(2), 1.0) / len(calls)), 1), 200)
    found = [run(rounds) for _ in range(repeats)]
    return {"us": median(found), "low_us": min(found), "high_us": max(found), "graph": captured}


def _captured(calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], Any], bool]:
    """The calls as one graph, or one by one where they cannot be captured."""
    import torch

    def plainly() -> None:
        for call in calls:
            call()

    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plainly()
    except RuntimeError:
        torch.cuda.synchronize()
        return plainly, False
    return graph.replay, True
