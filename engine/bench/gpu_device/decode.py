"""Section ``decode``: one new token for each of many sequences, bound by reading the cache."""

from __future__ import annotations

from typing import Any

from engine.bench.gpu_device.chain import chain_task
from engine.bench.gpu_device.shapes import Shape
from engine.bench.gpu_device.speed import line, prepare

__all__ = ["SHAPES", "line", "prepare", "tasks"]

SHAPES = ((32, 2048), (32, 4096), (8, 32_768))  # sequences, tokens of context
SLOTS = (1 << 18) + 128  # as many as the largest shape uses: 1.07 GB per pool


def tasks(impl: str, *, small: bool) -> list[dict[str, Any]]:
    """Each shape with small and large pages, and one shape with plain XLA."""
    if small:
        return [chain_task(Shape(((2, 1, 32),), 8, 4, 2, 16), impl, slots=128, pools=2, calls=2)]
    sizes = {"slots": SLOTS, "pools": 4, "calls": 8}
    shapes = [Shape(((batch, 1, context),), page) for batch, context in SHAPES for page in (16, 64)]
    return [chain_task(shape, impl, **sizes) for shape in shapes] + [
        chain_task(shapes[0], "xla", slots=SLOTS, pools=4, calls=4)
    ]
