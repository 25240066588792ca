"""Section ``flex``: torch's flex attention over a paged cache, compiled; the closest that torch has to ours.

Its caches are ``[H, slots, D]``, one for K and one for V; the block mask names the pages of each sequence. The new
tokens are in the cache already. Sequences are whole pages long, so that only the blocks on the diagonal need a mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from engine.bench.gpu_device import decode, prefill
from engine.bench.gpu_device.sdpa import attend
from engine.bench.gpu_device.shapes import Shape
from engine.bench.gpu_device.speed import rates
from engine.bench.gpu_device.torch_clock import time_torch, torch_device

QUERY_BLOCK = 128  # the default block size of flex's masks
COPIES = 3  # copies of the cache, used in turn


def tasks(impl: str, *, small: bool) -> list[dict[str, Any]]:
    """Every shape with pages as large as flex's own blocks, then decode with smaller pages."""
    if small:
        shapes = [Shape(((2, 1, 32),), 16, 4, 2, 16), Shape(((2, 8, 32),), 16, 4, 2, 16)]
        return [{"shape": shape.values(), "compile": False} for shape in shapes]
    shapes = [Shape(((batch, 1, context),), 128) for batch, context in decode.SHAPES]
    shapes += [Shape((rows,), 128) for rows in prefill.SHAPES]
    batch, context = decode.SHAPES[0]
    shapes += [Shape(((batch, 1, context),), page) for page in (64, 16)]
    return [{"shape": shape.values(), "compile": True} for shape in shapes]


def prepare(task: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Returns the task's measurement; torch compiles at the first call."""
    return functools.partial(_measure, task)


def _measure(task: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    shape, device = Shape.of(task["shape"]), torch_device()
    ((batch, new, length),) = shape.rows
    pages = 1 + batch * length // shape.page_size
    table = torch.tensor(shape.page_table(pages), device=device)
    mask = paged_mask(table, new, length, pages, shape.page_size)
    dtype, dim = getattr(torch, shape.dtype), shape.head_dim
    q = torch.randn(batch, shape.q_heads, new, dim, device=device, dtype=dtype)
    caches = [
        [torch.randn(1, shape.kv_heads, pages * shape.page_size, dim, device=device, dtype=dtype) for _ in range(2)]
        for _ in range(COPIES)
    ]
    call = torch.compile(flex_attention, dynamic=False) if task["compile"] else flex_attention
    # A block of keys cannot be larger than a page.
    options: Any = {"kernel_options": {"BLOCK_N": shape.page_size}} if shape.page_size < QUERY_BLOCK else {}
    calls = [functools.partial(call, q, k, v, block_mask=mask, enable_gqa=True, **options) for k, v in caches]
    with torch.no_grad():
        expected = attend(q, *(_gathered(half, table, shape.page_size) for half in caches[0]))
        error = float((calls[0]() - expected).abs().max())
        del expected
        timed = time_torch(calls)
    return timed | rates(shape, timed["us"]) | {"error": error}


def paged_mask(table: Any, new: int, length: int, pages: int, page_size: int) -> Any:
    """The causal block mask of sequences of equal lengths, over the slots of a cache of ``pages``.

    Args:
        table: ``[B, P]`` int32 page ids, P whole pages of context.
        new: queries per sequence, its last tokens.
        length: tokens of context per sequence.
        pages: pages of the cache.
        page_size: tokens per page, and keys of a block.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    batch, columns = table.shape
    device = table.device
    logical = torch.full((batch, pages), -1, dtype=torch.int32, device=device)
    logical.scatter_(1, table.long(), torch.arange(columns, dtype=torch.int32, device=device).expand(batch, -1))

    def visible(b: Any, h: Any, q: Any, slot: Any) -> Any:
        page = logical[b, slot // page_size]
        return (page >= 0) & (page * page_size + slot % page_size <= q + (length - new))

    first = torch.arange(0, new, QUERY_BLOCK, device=device) + length - new  # position of each block's first query
    last = torch.clamp(first + QUERY_BLOCK - 1, max=length - 1)
    full = (first + 1) // page_size  # pages that all queries of the block see whole
    partial = last // page_size + 1 - full
    indices = torch.zeros(2, batch, 1, len(first), pages, dtype=torch.int32, device=device)
    for block, (whole, some) in enumerate(zip(full.tolist(), partial.tolist(), strict=True)):
        indices[0, :, 0, block, :whole] = table[:, :whole]
        indices[1, :, 0, block, :some] = table[:, whole : whole + some]
    counts = [n.to(torch.int32).expand(batch, 1, -1).contiguous() for n in (full, partial)]
    return BlockMask.from_kv_blocks(
        counts[1],
        indices[1],
        counts[0],
        indices[0],
        BLOCK_SIZE=(QUERY_BLOCK, page_size),
        mask_mod=visible,
        seq_lengths=(new, pages * page_size),
    )


def _gathered(half: Any, table: Any, page_size: int) -> Any:
    """``[1, H, slots, D]`` as ``[B, H, L, D]``, the sequences' tokens in order."""
    heads, dim = half.shape[1], half.shape[3]
    paged = half.view(heads, -1, page_size, dim)[:, table.long()]
    return paged.transpose(0, 1).reshape(len(table), heads, -1, dim)


def line(task: dict[str, Any], result: dict[str, Any]) -> str:
    """One measurement, as a line."""
    shape = Shape.of(task["shape"])
    return (
        f"{shape.name}, torch flex, page {shape.page_size}: {result['us']:,.1f} µs, {result['gb_per_s']:,.0f} GB/s, "
        f"{result['tflop_per_s']:,.0f} TFLOP/s; off from dense by {result['error']:.1e}"
        + ("" if result["graph"] else "; no graph")
    )
