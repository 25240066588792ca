"""Section ``layers``: sixteen layers' attention in one program, each over its own pool, where launches show."""

from __future__ import annotations

from typing import Any

from engine.bench.gpu_device.chain import chain_task
from engine.bench.gpu_device.shapes import Shape
from engine.bench.gpu_device.speed import line, prepare

__all__ = ["line", "prepare", "tasks"]

LAYERS = 16
SLOTS = (1 << 15) + 128
# Small to full batches of decoding, and one with a chunk of a prompt among them: 256 tokens in all.
STEPS = (((1, 1, 1024),), ((8, 1, 1024),), ((32, 1, 1024),), ((31, 1, 1024), (1, 225, 225)))


def tasks(impl: str, *, small: bool) -> list[dict[str, Any]]:
    """Each step by ours, and the largest decode by XLA alone and as a program of one layer."""
    if small:
        return [chain_task(Shape(((1, 1, 24), (1, 5, 9)), 8, 4, 2, 16), impl, slots=128, pools=3, calls=3)]
    sizes = {"slots": SLOTS, "pools": LAYERS, "calls": LAYERS}
    steps = [chain_task(Shape(rows), impl, **sizes) for rows in STEPS]
    alone = chain_task(Shape(STEPS[2]), impl, slots=SLOTS, pools=1, calls=1)  # its share of planning is the whole
    return [*steps, chain_task(Shape(STEPS[2]), "xla", **sizes), alone]
