"""Writes rows into the fused buffer on a Hopper GPU: two bulk copies per token, in place by aliasing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Ref = Any  # a Pallas memory reference; jax has no public type for it
MOST_TOKENS = 8  # tokens per block, at most
BLOCKS = 264  # blocks that fill the device twice; fewer tokens than that go to blocks of one token
SMEM_BYTES = 128 << 10  # shared memory for the tokens of one block
COPY_UNIT = 16  # bytes; the size of a bulk copy is a multiple
MOST_IN_COPY = 256  # elements of a bulk copy along each axis
STAGE_UNIT = 128  # bytes; a bulk copy's place in shared memory starts at a multiple


def rows_are_copied(heads: int, head_dim: int, dtype: Any) -> bool:
    """Whether the kernel takes rows ``[heads, head_dim]``: whole units of a bulk copy, within its limits."""
    row_bytes = head_dim * jnp.dtype(dtype).itemsize
    fits = max(heads, head_dim) <= MOST_IN_COPY and 2 * heads * row_bytes <= SMEM_BYTES
    return fits and row_bytes % COPY_UNIT == 0


def scatter_gpu(
    fused: jax.Array, slots: jax.Array, tokens: jax.Array | None, k: jax.Array, v: jax.Array, *, interpret: Any = False
) -> jax.Array:
    """Copies K and V of ``tokens[i]`` to ``slots[i]``: K of each head before its V, as the fused layout has them.

    Args:
        fused: ``[S, 2H, D]``, donated for a write in place.
        slots: ``[T]`` int32; those below 0 or past the end are dropped; the others are all different.
        tokens: ``[T]`` int32 index of the token for each slot; None is 0, 1, 2, ….
        k: ``[T, H, D]`` in the buffer's dtype, of rows that ``rows_are_copied`` takes.
        v: as ``k``.
        interpret: False, or ``plgpu.InterpretGPUParams`` to run on a CPU.

    Returns:
        The buffer.
    """
    count, heads, head_dim = k.shape
    if not count:
        return fused
    size = _tokens_of_a_block(count, heads * head_dim * fused.dtype.itemsize)
    blocks = -(-count // size)
    slots = jnp.where(slots < fused.shape[0], slots, -1)
    slots = jnp.pad(slots, (0, blocks * size - count), constant_values=-1)
    gathered = () if tokens is None else (jnp.pad(tokens, (0, blocks * size - count)),)
    cache = jax.new_ref(fused.reshape(fused.shape[0], heads, 2, head_dim))

    def body(*refs: Ref) -> None:
        slots_ref, *tokens_ref, k_ref, v_ref, cache_ref, k_stage, v_stage, arrived = refs
        first = lax.axis_index("block") * size
        for new, stage in ((k_ref, k_stage), (v_ref, v_stage)):
            if not tokens_ref:
                plgpu.copy_gmem_to_smem(new.at[pl.ds(first, size)], stage, arrived)
                continue
            for i in range(size):
                token = tokens_ref[0][first + i]
                plgpu.copy_gmem_to_smem(new.at[token], stage.at[i], arrived)
        plgpu.barrier_wait(arrived)
        for i in range(size):
            slot = slots_ref[first + i]

            @pl.when(slot >= 0)
            def write(i: int = i, slot: jax.Array = slot) -> None:
                for half, stage in enumerate((k_stage, v_stage)):
                    plgpu.copy_smem_to_gmem(stage.at[i], cache_ref.at[slot, :, half])

        plgpu.wait_smem_to_gmem(0)

    stage = plgpu.SMEM((size, heads, head_dim), fused.dtype)
    plgpu.kernel(
        body,
        out_type=(),
        scratch_types=(stage, stage, plgpu.Barrier(num_arrivals=2 * (size if gathered else 1))),
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name="scatter_rows",
    )(slots, *gathered, k, v, cache)
    written: jax.Array = cache[...]
    return written.reshape(fused.shape)


def _tokens_of_a_block(count: int, half_bytes: int) -> int:
    """Tokens per block; ``half_bytes`` is the size of one token's K. Each token's place must start at a whole unit."""
    if half_bytes % STAGE_UNIT:
        return 1
    return min(max(1, count // BLOCKS), MOST_TOKENS, SMEM_BYTES // (2 * half_bytes))
