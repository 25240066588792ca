"""Section ``prefill``: many new tokens per sequence, bound by the matrix units."""

from __future__ import annotations

from typing import Any

from engine.bench.gpu_device.chain import chain_task
from engine.bench.gpu_device.decode import SLOTS
from engine.bench.gpu_device.shapes import Shape
from engine.bench.gpu_device.speed import line, prepare

__all__ = ["SHAPES", "line", "prepare", "tasks"]

# Whole prompts, a chunk after a long prefix, several prompts at once: (sequences, new tokens, context).
SHAPES = ((1, 1024, 1024), (1, 4096, 4096), (1, 16_384, 16_384), (1, 256, 16_640), (4, 512, 512))
XLA_TOKENS = 4096  # above this plain XLA takes long and shows nothing new


def tasks(impl: str, *, small: bool) -> list[dict[str, Any]]:
    """Each shape with small and large pages, and the smaller shapes with plain XLA."""
    if small:
        return [chain_task(Shape(((2, 8, 24),), 8, 4, 2, 16), impl, slots=128, pools=2, calls=2)]
    ours = [(Shape((rows,), page), impl) for rows in SHAPES for page in (16, 64)]
    theirs = [(Shape((rows,)), "xla") for rows in SHAPES if rows[1] <= XLA_TOKENS]
    return [chain_task(shape, name, slots=SLOTS, pools=4, calls=4) for shape, name in ours + theirs]
