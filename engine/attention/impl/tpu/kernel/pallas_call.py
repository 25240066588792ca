"""The Pallas call: one step of one layer in one launch.

It writes the new rows into their pages, then walks the items, one kind after the other. The online softmax is that of
FlashAttention-2, the cache layout that of tpu_commons' kernel v3.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.attention.impl.tpu.kernel import flash, transfer
from engine.attention.impl.tpu.kernel.geometry import Geometry
from engine.attention.impl.tpu.kernel.items import Schedule
from engine.attention.impl.tpu.kernel.loops import Lane, Operands, Scratch, Semaphores, run_lane
from engine.kv.layout import LANES, SUBLANES


def scratch_shapes(geo: Geometry) -> Scratch:
    """Shapes and dtypes of the kernel's VMEM scratch."""
    rows, fetch_pages = (max(tile[at] for tile in geo.tiles) for at in (1, 2))
    queries = -(-rows // geo.group)
    q = pltpu.VMEM((2, geo.heads, queries, geo.group // geo.io_pack, geo.io_pack, geo.lanes), geo.io_dtype)
    lse = (2, geo.heads, queries, geo.group, 1, LANES) if geo.has_lse else (SUBLANES, LANES)
    return Scratch(
        pages=pltpu.VMEM((2, fetch_pages, geo.page_size, geo.stride, geo.pack, LANES), geo.kv_dtype),
        q=q,
        out=q,
        lse=pltpu.VMEM(lse, jnp.float32),
        state=flash.State(*(pltpu.VMEM((geo.heads, rows, width), jnp.float32) for width in (LANES, LANES, geo.lanes))),
    )


def call_kernel(
    geo: Geometry,
    schedule: Schedule,
    q: jax.Array,
    new: jax.Array,
    sinks: jax.Array | None,
    cache: jax.Array,
    *,
    vmem_limit_bytes: int,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Runs one step of one layer.

    Args:
        geo: static sizes.
        schedule: the step's items.
        q: ``[H, T, G / p, p, D']`` queries in the io dtype, scaled into the log2 domain.
        new: ``[T, words, p, 128]`` the merged new rows, in the cache's dtype.
        sinks: ``[H, R, 128]`` float32 in the log2 domain, rows that repeat (``flash.reset``), or None.
        cache: ``[pages, page_size, words, p, 128]``, aliased to the last result.
        vmem_limit_bytes: bytes of VMEM that the compiler may use.
        interpret: False, or ``pltpu.InterpretParams``.

    Returns:
        out shaped as ``q``; where the sizes ask for it lse ``[H, T, G, 1, 128]`` float32; the cache. In out and lse the
        tokens of no item hold anything.
    """
    scalars, has_sinks = len(schedule), sinks is not None
    lse_shape = [jax.ShapeDtypeStruct((*q.shape[:2], geo.group, 1, LANES), jnp.float32)] * geo.has_lse
    out_shape = [
        jax.ShapeDtypeStruct(q.shape, q.dtype), *lse_shape, jax.ShapeDtypeStruct(cache.shape, cache.dtype)
    ]  # fmt: skip
    shapes, pair = scratch_shapes(geo), pltpu.SemaphoreType.DMA((2,))
    hbm, vmem = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.VMEM)

    def body(*refs: Any) -> None:
        left = list(refs)
        steps = Schedule(*(left.pop(0) for _ in range(scalars)))
        q_ref, new_ref, _ = (left.pop(0) for _ in range(3))
        sinks_ref = left.pop(0) if has_sinks else None
        out_ref, lse_ref = left.pop(0), left.pop(0) if geo.has_lse else None
        ops = Operands(q_ref, new_ref, sinks_ref, out_ref, lse_ref, left.pop(0))
        scratch, sems = left
        transfer.write_new_rows(geo, steps, ops.new, ops.cache, sems.write)
        first = steps.counts[0] * 0
        for kind, tile in enumerate(geo.tiles):
            lane = Lane(geo, tile, steps, ops, scratch, sems, first, steps.counts[kind])
            run_lane(lane)
            first += lane.count

    call = pl.pallas_call(
        body,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars,
            grid=(1,),
            in_specs=[hbm] * 3 + [vmem] * has_sinks,
            out_specs=[hbm] * len(out_shape),
            scratch_shapes=[shapes, Semaphores(pair, pair, pair, pltpu.SemaphoreType.DMA)],
        ),
        input_output_aliases={scalars + 2: len(out_shape) - 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit_bytes, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="ragged_paged_attention",
    )
    return tuple(call(*schedule, q, new, cache, *([sinks] if has_sinks else [])))
