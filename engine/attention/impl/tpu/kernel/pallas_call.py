"""The Pallas call: one step of one layer in one launch, the writes of the new rows first, then the items.

The online softmax is that of FlashAttention-2, the cache layout that of tpu_commons' kernel v3.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.attention.impl.tpu.contract.geometry import Geometry
from engine.attention.impl.tpu.contract.scratch import Operands, Semaphores, fresh_shapes, scratch_shapes
from engine.attention.impl.tpu.contract.step_plan import Schedule
from engine.attention.impl.tpu.kernel import new_rows
from engine.attention.impl.tpu.kernel.loops import run_lanes
from engine.kv.layout import LANES


def call_kernel(
    geo: Geometry,
    schedule: Schedule,
    q: jax.Array,
    new: tuple[jax.Array, ...],
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
        q: ``[T, words, p, 128]`` queries in the io dtype.
        new: the new rows in the cache's dtype, ``[T, words, p, 128]`` or K and V apart (``new_rows.write``).
        sinks: as ``flash.reset`` takes them, or None.
        cache: ``[pages, page_size, words, p, 128]``, aliased to the last result.
        vmem_limit_bytes: bytes of VMEM that the compiler may use.
        interpret: False, or ``pltpu.InterpretParams``.

    Returns:
        out like ``q``, zero for tokens of no item; where it is wanted lse ``[H, G / p, T * p, 1, 128]`` float32, where
        those hold anything; the cache.
    """
    scalars, has_sinks = len(schedule), sinks is not None
    lse = (geo.heads, geo.group_words, len(q) * geo.io_pack, 1, LANES)
    lse_shape = [jax.ShapeDtypeStruct(lse, jnp.float32)] * geo.has_lse
    out_shape = [
        jax.ShapeDtypeStruct(q.shape, q.dtype), *lse_shape, jax.ShapeDtypeStruct(cache.shape, cache.dtype)
    ]  # fmt: skip
    pair = pltpu.SemaphoreType.DMA((2,))
    hbm, vmem = (pl.BlockSpec(memory_space=space) for space in (pltpu.HBM, pltpu.VMEM))

    def body(*refs: Any) -> None:
        left = list(refs)
        steps = Schedule(*(left.pop(0) for _ in range(scalars)))
        q_ref, new_refs, _ = left.pop(0), tuple(left.pop(0) for _ in new), left.pop(0)
        sinks_ref = left.pop(0) if has_sinks else None
        out_ref, lse_ref = left.pop(0), left.pop(0) if geo.has_lse else None
        ops = Operands(q_ref, new_refs, sinks_ref, out_ref, lse_ref, left.pop(0))
        # One scope after the other, in the same memory.
        pl.run_scoped(functools.partial(new_rows.write, geo, steps, ops), *fresh_shapes(geo))
        pl.run_scoped(functools.partial(run_lanes, geo, steps, ops), scratch_shapes(geo), Semaphores(pair, pair, pair))

    call = pl.pallas_call(
        body,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars,
            grid=(1,),
            in_specs=[hbm] * (2 + len(new)) + [vmem] * has_sinks,
            out_specs=[hbm] * len(out_shape),
        ),
        input_output_aliases={scalars + 1 + len(new): len(out_shape) - 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit_bytes, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="ragged_paged_attention",
    )
    operands = q, *new, cache
    if not interpret:
        # Else XLA copies small ones into VMEM, before and beside the kernel.
        operands = tuple(pltpu.with_memory_space_constraint(operand, pltpu.HBM) for operand in operands)
    return tuple(call(*schedule, *operands, *([sinks] if has_sinks else [])))
