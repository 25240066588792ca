"""Writes rows into the fused buffer on TPU, one DMA a row: no XLA scatter, in place by aliasing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Ref = Any  # a Pallas memory reference; jax has no public type for it


def scatter_rows_tpu(fused: jax.Array, loc: jax.Array, rows: jax.Array, *, interpret: Any = False) -> jax.Array:
    """Copies ``rows[t]`` to ``fused[loc[t]]``; any ``loc`` below 0 or past the end is dropped.

    All copies are in flight at once, so of two rows for one slot either may stay: an engine never makes such a pair.

    Args:
        fused: ``[S, 2H', D']``, donated for a write in place; rows of whole 32-bit words and whole lanes.
        loc: ``[T]`` int32 slots.
        rows: ``[T, 2H', D']`` merged K and V of the buffer's dtype, padded as the buffer is.
        interpret: False, or ``pltpu.InterpretParams`` to run on a CPU.

    Returns:
        The buffer.
    """
    slots, count, lanes = fused.shape
    tokens, pack = rows.shape[0], 4 // fused.dtype.itemsize
    # The packed view keeps the bytes: with whole words a slot, no DMA cuts a tile.
    packed = (count // pack, pack, lanes)

    def body(loc_ref: Ref, rows_ref: Ref, _: Ref, out_ref: Ref, sem: Ref) -> None:
        def copy(token: Any, written: Any) -> Any:
            slot = loc_ref[token]
            kept = (slot >= 0) & (slot < slots)

            @pl.when(kept)
            def start() -> None:
                pltpu.make_async_copy(rows_ref.at[token], out_ref.at[slot], sem).start()

            return written + kept.astype(jnp.int32)

        written = jax.lax.fori_loop(0, tokens, copy, jnp.int32(0))
        # A semaphore counts bytes, so one wait serves all rows.
        done = rows_ref.at[pl.ds(0, written)]
        pltpu.make_async_copy(done, done, sem).wait()

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((slots, *packed), fused.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[hbm, hbm],
            out_specs=hbm,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        input_output_aliases={2: 0},
        interpret=interpret,
        name="scatter_rows",
    )(loc, rows.reshape(tokens, *packed), fused.reshape(slots, *packed))
    return jnp.reshape(out, fused.shape)
