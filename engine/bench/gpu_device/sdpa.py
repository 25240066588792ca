"""Section ``sdpa``: torch's scaled_dot_product_attention over a contiguous cache, with each of its backends.

It reads no page table and writes no new token: its time is that of attention alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from engine.bench.gpu_device import decode, prefill
from engine.bench.gpu_device.shapes import Shape
from engine.bench.gpu_device.speed import rates
from engine.bench.gpu_device.torch_clock import time_torch, torch_device

BACKENDS = ("flash_attention", "cudnn_attention", "math")
ROTATED_BYTES = 1 << 30  # bytes of K and V: many times the size of any L2


def tasks(impl: str, *, small: bool) -> list[dict[str, Any]]:
    """Every shape with each fast backend; ``impl`` is not used.

    Decode also runs with the queries of each KV head folded into one sequence, which is faster in some backends.
    """
    if small:
        rows = [(2, 1, 32), (2, 8, 24)]
        return [_task(Shape((row,), 8, 4, 2, 16), "math", folded=fold) for row in rows for fold in {False, row[1] == 1}]
    shapes = [Shape(((batch, 1, context),)) for batch, context in decode.SHAPES]
    shapes += [Shape((rows,)) for rows in prefill.SHAPES]
    plain = [_task(shape, backend) for shape in shapes for backend in BACKENDS[:2]]
    folded = [_task(shape, backend, folded=True) for shape in shapes[:3] for backend in BACKENDS[:2]]
    return plain + folded


def _task(shape: Shape, backend: str, *, folded: bool = False) -> dict[str, Any]:
    return {"shape": shape.values(), "backend": backend, "folded": folded}


def prepare(task: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Returns the task's measurement; there is nothing to compile."""
    return functools.partial(_measure, task)


def _measure(task: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = Shape.of(task["shape"])
    copies = max(1, -(-ROTATED_BYTES // shape.kv_bytes)) if torch_device() == "cuda" else 1
    caches = [_tensors(shape) for _ in range(min(copies, 16))]
    with sdpa_kernel(getattr(SDPBackend, task["backend"].upper())), torch.no_grad():
        timed = time_torch([functools.partial(attend, *tensors, folded=task["folded"]) for tensors in caches])
    return timed | rates(shape, timed["us"])


def _tensors(shape: Shape) -> tuple[Any, Any, Any]:
    """Random ``q[B, Hq, n, D]`` and ``k, v[B, H, L, D]``."""
    import torch

    ((batch, new, length),) = shape.rows
    sizes = ((shape.q_heads, new), (shape.kv_heads, length), (shape.kv_heads, length))
    dtype = getattr(torch, shape.dtype)
    q, k, v = (torch.randn(batch, *size, shape.head_dim, device=torch_device(), dtype=dtype) for size in sizes)
    return q, k, v


def attend(q: Any, k: Any, v: Any, *, folded: bool = False) -> Any:
    """Causal attention of the last ``n`` of ``L`` tokens.

    Args:
        q: ``[B, Hq, n, D]`` queries.
        k: ``[B, H, L, D]`` keys.
        v: ``[B, H, L, D]`` values.
        folded: with one new token, whether the queries of a KV head form a sequence.

    Returns:
        ``[B, Hq, n, D]``, or ``[B, H, Hq / H, D]`` where folded.
    """
    from torch.nn import functional
    from torch.nn.attention.bias import causal_lower_right

    new, length = q.shape[2], k.shape[2]
    if folded:
        return functional.scaled_dot_product_attention(q.view(len(q), k.shape[1], -1, q.shape[3]), k, v)
    mask = causal_lower_right(new, length) if 1 < new < length else None
    whole = 1 < new == length
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, enable_gqa=True)


def line(task: dict[str, Any], result: dict[str, Any]) -> str:
    """One measurement, as a line."""
    how = task["backend"].removesuffix("_attention") + (", folded" if task["folded"] else "")
    return (
        f"{Shape.of(task['shape']).name}, torch {how}: {result['us']:,.1f} µs, {result['gb_per_s']:,.0f} GB/s, "
        f"{result['tflop_per_s']:,.0f} TFLOP/s" + ("" if result["graph"] else "; no graph")
    )
