"""The memory that the kernel works with: operands in HBM, buffers in VMEM and their DMA semaphores.

The buffers are of two scopes that follow each other in the same memory: the new rows', and attention's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from engine.attention.impl.tpu.contract.geometry import Geometry
from engine.kv.layout import LANES, SUBLANES

Ref = Any  # a Pallas memory reference; jax has no public type for it
ZEROS = 32  # tokens of one DMA of zeros


class Operands(NamedTuple):
    """References to HBM, and for the sinks to VMEM; all as in ``call_kernel``."""

    q: Ref
    new: tuple[Ref, ...]
    sinks: Ref | None
    out: Ref
    lse: Ref | None
    cache: Ref


class State(NamedTuple):
    """Softmax state of the rows of each KV head, float32 refs in VMEM."""

    peak: Ref  # [H, rows, 128] running maximum, the same in every lane
    total: Ref  # [H, rows, 128] running sum, spread over the lanes
    acc: Ref  # [H, rows, D']


class Scratch(NamedTuple):
    """VMEM: two buffers of each, and one softmax state; each kind of item uses a part of it.

    Attributes:
        pages: ``[2, fetch_pages, page_size, stride, p, 128]``.
        q: ``[2, queries, stride, p, 128]``.
        out: as ``q``.
        lse: ``[2, H, G / p, queries * p, 1, 128]``; a placeholder where no log-sum-exp is wanted.
        state: softmax state.
    """

    pages: Any
    q: Any
    out: Any
    lse: Any
    state: State


class Semaphores(NamedTuple):
    """DMA semaphores, one for each buffer."""

    pages: Any
    q: Any
    out: Any


def scratch_shapes(geo: Geometry) -> Scratch:
    """Shapes and dtypes of the kernel's VMEM scratch."""
    rows, fetch_pages = (max(tile[at] for tile in geo.tiles) for at in (1, 2))
    queries = geo.tiles[-1].queries
    q = pltpu.VMEM((2, queries, geo.q_stride, geo.io_pack, LANES), geo.io_dtype)
    lse = (2, geo.heads, geo.group_words, queries * geo.io_pack, 1, LANES) if geo.has_lse else (SUBLANES, LANES)
    return Scratch(
        pages=pltpu.VMEM((2, fetch_pages, geo.page_size, geo.stride, geo.pack, LANES), geo.kv_dtype),
        q=q,
        out=q,
        lse=pltpu.VMEM(lse, jnp.float32),
        state=State(*(pltpu.VMEM((geo.heads, rows, width), jnp.float32) for width in (LANES, LANES, geo.lanes))),
    )


class Fresh(NamedTuple):
    """VMEM for K and V that arrive apart, and DMA semaphores for each of two buffers.

    Attributes:
        raw: ``[2, 2, fresh_tokens * H / p, p, 128]``, K and V as they arrive; a placeholder where they come merged.
        merged: ``[2, fresh_tokens, words, p, 128]``; likewise.
        arrived: semaphores of what arrives.
        left: semaphores of the rows that leave.
    """

    raw: Any
    merged: Any
    arrived: Any
    left: Any


def fresh_shapes(geo: Geometry) -> tuple[Fresh, Any, Any]:
    """Shapes of what ``write`` works with: for the new rows, zeros, and the semaphore of the zeros."""
    pair, tokens = pltpu.SemaphoreType.DMA((2,)), geo.fresh_tokens
    raw = (2, 2, tokens * geo.heads // geo.pack, geo.pack, LANES) if tokens else (SUBLANES, LANES)
    merged = (2, tokens, geo.words, geo.pack, LANES) if tokens else (SUBLANES, LANES)
    zeros = (min(ZEROS, geo.tiles[-1].queries), geo.q_stride, geo.io_pack, LANES)
    halves = pltpu.VMEM(raw, geo.kv_dtype), pltpu.VMEM(merged, geo.kv_dtype)
    return Fresh(*halves, pair, pair), pltpu.VMEM(zeros, geo.io_dtype), pltpu.SemaphoreType.DMA
