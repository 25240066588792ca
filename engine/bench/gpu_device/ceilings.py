"""Section ``ceilings``: the rates that the device reaches with torch, for a copy, a read and a matrix product."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from engine.bench.gpu_device.torch_clock import time_torch, torch_device


def tasks(impl: str, *, small: bool) -> list[dict[str, Any]]:
    """The three tasks; ``impl`` is not used."""
    size = 1 << 20 if small else 4 << 30
    return [
        {"what": "copy", "bytes": size},
        {"what": "read", "bytes": size},
        {"what": "matmul", "n": 128 if small else 8192},
    ]


def prepare(task: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Returns the task's measurement; there is nothing to compile."""
    return functools.partial(_measure, task)


def _measure(task: dict[str, Any]) -> dict[str, Any]:
    """Makes the call and its operands; all data is random, because zeros run faster."""
    import torch

    device = torch_device()
    if task["what"] == "matmul":
        n = task["n"]
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=torch.bfloat16)
        timed = time_torch([lambda: torch.matmul(a, b, out=out)] * 4)
        return timed | {"tflop_per_s": 2 * n**3 / timed["us"] / 1e6}
    source = torch.randn(task["bytes"] // 4, device=device)
    if task["what"] == "copy":
        target = torch.empty_like(source)
        timed = time_torch([lambda: target.copy_(source)])
        return timed | {"gb_per_s": 2 * task["bytes"] / timed["us"] / 1e3}
    timed = time_torch([lambda: torch.sum(source)])
    return timed | {"gb_per_s": task["bytes"] / timed["us"] / 1e3}


def line(task: dict[str, Any], result: dict[str, Any]) -> str:
    """One ceiling, as a line."""
    size = f"bfloat16 {task['n']}^3" if "n" in task else f"{task['bytes'] / 1e9:.2g} GB"
    rate = f"{result['tflop_per_s']:,.0f} TFLOP/s" if "n" in task else f"{result['gb_per_s']:,.0f} GB/s"
    return f"{task['what']} {size}: {rate} ({result['us']:,.0f} µs)"
