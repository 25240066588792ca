"""Writes rows into the fused buffer on TPU, one DMA per row: no XLA scatter, in place by aliasing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.kv.layout import merge_kv, pad_fused
from engine.kv.tpu_view import unview_words, view_words

Ref = Any  # a Pallas memory reference; jax has no public type for it
SMEM_TOKENS = 1 << 15  # tokens per launch: two numbers each, a quarter of SMEM's 1 MiB


def scatter_tpu(
    fused: jax.Array, slots: jax.Array, tokens: jax.Array, k: jax.Array, v: jax.Array, *, interpret: Any = False
) -> jax.Array:
    """Copies the merged K and V of ``tokens[i]`` to ``slots[i]``, in launches of at most ``SMEM_TOKENS``.

    All copies of a launch are in flight at once, so no two may go to one slot.

    Args:
        fused: ``[S, 2H', D']``, donated for a write in place, padded for a TPU (``tpu_view.view_is_free``).
        slots: ``[T]`` int32; those below 0 or past the end are dropped; the others are all different.
        tokens: ``[T]`` int32 index of the token for each slot.
        k: ``[T, H, D]`` in the buffer's dtype.
        v: as ``k``.
        interpret: False, or ``pltpu.InterpretParams`` to run on a CPU.

    Returns:
        The buffer.
    """
    rows = view_words(pad_fused(merge_kv(k, v), *fused.shape[1:]))
    words = view_words(fused)
    for start in range(0, slots.shape[0], SMEM_TOKENS):
        part = slice(start, start + SMEM_TOKENS)
        with jax.enable_x64(False):  # a kernel counts in 32 bits, whatever the program around it does
            words = _scatter_words(words, slots[part], tokens[part], rows, interpret)
    return unview_words(words, *fused.shape[1:])


def _scatter_words(words: jax.Array, slots: jax.Array, tokens: jax.Array, rows: jax.Array, interpret: Any) -> jax.Array:
    def body(slots_ref: Ref, tokens_ref: Ref, rows_ref: Ref, _: Ref, out_ref: Ref, sem: Ref) -> None:
        def copy(index: Any, written: Any) -> Any:
            slot = slots_ref[index]
            kept = (slot >= 0) & (slot < words.shape[0])

            @pl.when(kept)
            def start() -> None:
                pltpu.make_async_copy(rows_ref.at[tokens_ref[index]], out_ref.at[slot], sem).start()

            return written + kept.astype(jnp.int32)

        written = jax.lax.fori_loop(0, slots.shape[0], copy, jnp.int32(0))

        @pl.when(written > 0)
        def wait() -> None:
            # A semaphore counts bytes, so one wait serves all rows.
            done = rows_ref.at[pl.ds(0, written)]
            pltpu.make_async_copy(done, done, sem).wait()

    if not interpret:
        # Else XLA moves a whole small cache into VMEM and back, around the write of a few rows.
        words = pltpu.with_memory_space_constraint(words, pltpu.HBM)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    written: jax.Array = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(words.shape, words.dtype, manual_axis_type=jax.typeof(words).manual_axis_type),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[hbm, hbm],
            out_specs=hbm,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        input_output_aliases={3: 0},
        interpret=interpret,
        name="scatter_rows",
    )(slots, tokens, rows, words)
    return written
