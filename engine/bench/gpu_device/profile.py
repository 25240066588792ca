"""Section ``profile``: device time of each kernel of our calls, by name, from jax's profiler."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from engine.bench.gpu_device import layers
from engine.bench.gpu_device.chain import Chain, chain_task
from engine.bench.gpu_device.decode import SLOTS
from engine.bench.gpu_device.shapes import Shape

MOST_KERNELS = 8  # kernels printed per call; the file has all
LONGEST_NAME = 60


def tasks(impl: str, *, small: bool) -> list[dict[str, Any]]:
    """A decode, a prefill, and a mixed step."""
    if small:
        return layers.tasks(impl, small=True)
    shapes = [Shape(((32, 1, 2048),)), Shape(((1, 4096, 4096),)), Shape(layers.STEPS[-1])]
    return [chain_task(shape, impl, slots=SLOTS, pools=4, calls=4) for shape in shapes]


def prepare(task: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Compiles a task's chain."""
    chain = Chain(task)

    def run() -> dict[str, Any]:
        chain.load()
        for _ in range(2):
            chain.dispatch()
        chain.wait()
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                chain.dispatch()
                chain.wait()
            (file,) = Path(directory).rglob("*.xplane.pb")
            kernels = kernel_times(jax.profiler.ProfileData.from_file(str(file)).planes, chain.calls)
        chain.unload()
        return {"kernels": kernels}

    return run


def kernel_times(planes: Iterable[Any], calls: int) -> list[dict[str, Any]]:
    """Kernels on the streams of a GPU, longest first: ``name``, ``us`` per call, ``times`` per call."""
    found: dict[str, list[float]] = defaultdict(list)
    for plane in planes:
        for line in plane.lines if plane.name.startswith("/device:GPU") else ():
            for event in line.events if line.name.startswith("Stream") else ():
                found[event.name].append(event.duration_ns)
    kernels = [{"name": n, "us": sum(ns) / calls / 1e3, "times": len(ns) / calls} for n, ns in found.items()]
    return sorted(kernels, key=lambda kernel: -kernel["us"])


def line(task: dict[str, Any], result: dict[str, Any]) -> str:
    """The kernels that take most time, as lines."""
    shape, kernels = Shape.of(task["shape"]), result["kernels"]
    total = sum(kernel["us"] for kernel in kernels)
    lines = [f"{shape.name}, {task['impl']}: {total:,.1f} µs per call in {len(kernels)} kernels"]
    for kernel in kernels[:MOST_KERNELS]:
        lines.append(f"    {kernel['us']:8,.1f} µs, {kernel['times']:.2f} times  {kernel['name'][:LONGEST_NAME]}")
    return "\n".join(lines)
