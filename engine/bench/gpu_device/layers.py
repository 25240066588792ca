"""Section ``layers``: the attention of sixteen layers in one program, each with its own pool; shows launch costs."""

from __future__ import annotations

from typing import Any

from engine.bench.gpu_device.chain import chain_task
from engine.bench.gpu_device.shapes import Shape
from engine.bench.gpu_device.speed import line, prepare

__all__ = ["line", "prepare", "tasks"]

LAYERS = 16
SLOTS = (1 << 15) + 128
# Small to full batches of decode, and one batch with a chunk of a prompt: 256 tokens in all.
STEPS = (((1, 1, 1024),), ((8, 1, 1024),), ((32, 1, 1024),), ((31, 1, 1024), (1, 225, 225)))


def tasks(impl: str, *, small: bool) -> list[dict[str, Any]]:
    """Each step with ours, and the largest decode with plain XLA and as a program of one layer."""
    if small:
        return [chain_task(Shape(((1, 1, 24), (1, 5, 9)), 8, 4, 2, 16), impl, slots=128, pools=3, calls=3)]
    sizes = {"slots": SLOTS, "pools": LAYERS, "calls": LAYERS}
    steps = [chain_task(Shape(rows), impl, **sizes) for rows in STEPS]
    alone = chain_task(Shape(STEPS[2]), impl, slots=SLOTS, pools=1, calls=1)  # one layer pays for all of the planning
    return [*steps, chain_task(Shape(STEPS[2]), "xla", **sizes), alone]
