"""Times a chain of our calls: the common part of the sections decode, prefill and layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from engine.bench.gpu_device.chain import Chain
from engine.bench.gpu_device.clock import time_queued
from engine.bench.gpu_device.shapes import Shape


def prepare(task: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Compiles a task's chain."""
    chain = Chain(task)

    def run() -> dict[str, Any]:
        chain.load()
        timed = time_queued(chain.dispatch, chain.wait, chain.calls)
        finite = bool(jnp.isfinite(chain.out).all())
        chain.unload()
        return timed | rates(chain.shape, timed["us"]) | {"finite": finite} | memory_of(chain.compiled)

    return run


def rates(shape: Shape, us: float) -> dict[str, float]:
    """The rates of a call of ``us`` microseconds: GB/s of K and V read once, and TFLOP/s of the visible pairs."""
    return {"gb_per_s": shape.kv_bytes / us / 1e3, "tflop_per_s": shape.flops / us / 1e6}


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes of temporaries and of arrays updated in place in a compiled program."""
    usage = compiled.memory_analysis()
    return {"temp_bytes": int(usage.temp_size_in_bytes), "alias_bytes": int(usage.alias_size_in_bytes)}


def line(task: dict[str, Any], result: dict[str, Any]) -> str:
    """One measurement, as a line."""
    shape = Shape.of(task["shape"])
    spread = f"{result['low_us']:,.1f} to {result['high_us']:,.1f}"
    notes = [
        note for note, told in (("host-bound", result["host_bound"]), ("NOT FINITE", not result["finite"])) if told
    ]
    return (
        f"{shape.name}, page {shape.page_size}, {task['impl']}: {result['us']:,.1f} µs ({spread}), "
        f"{result['gb_per_s']:,.0f} GB/s, {result['tflop_per_s']:,.0f} TFLOP/s; alone {result['one_us']:,.1f} µs, host "
        f"{result['host_us']:,.1f} µs, temp {result['temp_bytes'] / 1e6:,.1f} MB" + "".join(f"; {n}" for n in notes)
    )
