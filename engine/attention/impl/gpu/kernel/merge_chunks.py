"""Merges the chunks of each decode row, and clears the tokens that belong to no sequence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engine.attention.impl.gpu.kernel import registers
from engine.attention.impl.gpu.kernel.sizes import ROWS, Ref, Sizes
from engine.attention.impl.gpu.work import Rows


def merge_chunks(
    sizes: Sizes, part: jax.Array, lse: jax.Array, v_scale: Any, sinks: Any, rows: Rows, out: Ref,
    *, interpret: Any,
) -> jax.Array:  # fmt: skip
    """Writes the decode rows of ``out`` and zeroes its dead rows.

    Args:
        sizes: the static sizes of the call.
        part: ``[C * H * G' + 64, D]`` float32, see ``decode_chunks``.
        lse: ``[C * H * G' + 64]`` float32, to base 2.
        v_scale: ``[R]`` float32, makes true values of stored ones.
        sinks: ``[R]`` float32, as exponents of 2; read where the call has sinks.
        rows: where each row's chunks and token are.
        out: a reference to ``[T, Hq, D]``, written in place.
        interpret: False, or ``plgpu.InterpretGPUParams``.

    Returns:
        The log-sum-exps of the decode rows ``[B, R]``, to base 2, sinks included.
    """
    batch = rows.first.shape[0]
    num_tokens, _, head_dim = out.shape
    cleared = -(-num_tokens // ROWS)
    kernel = plgpu.kernel(
        lambda *refs: _body(sizes, batch, refs),
        out_type=jax.ShapeDtypeStruct((batch, sizes.tiled_rows), jnp.float32),
        scratch_types=(
            plgpu.SMEM((ROWS, head_dim), sizes.dtype),
            plgpu.SMEM((ROWS,), jnp.float32),
        ),
        grid=(batch + cleared, sizes.tiled_rows // ROWS),
        grid_names=("row", "tile"),
        compiler_params=registers.OPTIONS,
        interpret=interpret,
        kernel_name="merge_chunks",
    )
    merged: jax.Array = kernel(part, lse, v_scale, sinks, *rows, out)
    return merged


def _body(sizes: Sizes, batch: int, refs: tuple[Ref, ...]) -> None:
    part_ref, lse_ref, v_scale_ref, sinks_ref, *row_refs, out_ref, merged_ref, stage, lse_stage = refs
    rows = Rows(*row_refs)
    row, tile = lax.axis_index("row"), lax.axis_index("tile")

    @pl.when(row >= batch)
    def clear() -> None:
        _clear(out_ref, stage, rows.live, (row - batch) * ROWS, tile)

    @pl.when(row < batch)
    def merge() -> None:
        index = jnp.minimum(row, batch - 1)
        count = rows.count[index]

        @pl.when(count > 0)
        def merge_row() -> None:
            span = pl.ds(pl.multiple_of(tile * ROWS, ROWS), ROWS)
            first = rows.first[index]

            def add(chunk: jax.Array, state: registers.Softmax) -> registers.Softmax:
                place = pl.ds(pl.multiple_of(chunk * sizes.chunk_rows + tile * ROWS, 8), ROWS)
                peak_of = plgpu.load(lse_ref.at[place], layout=registers.BY_ROW, optimized=False)
                values = plgpu.load(part_ref.at[place], layout=plgpu.Layout.WGMMA, optimized=False)
                peak = jnp.maximum(state.peak, peak_of)
                decay, weight = jnp.exp2(state.peak - peak), jnp.exp2(peak_of - peak)
                acc = state.acc * registers.across(decay, sizes.head_dim)
                acc += values * registers.across(weight, sizes.head_dim)
                return registers.Softmax(acc, peak, state.total * decay + weight)

            state = registers.start(sizes)
            if sizes.has_sinks:
                sink = plgpu.load(sinks_ref.at[span], layout=registers.BY_ROW, optimized=False)
                state = state._replace(peak=sink, total=registers.by_row(1.0))
            state = lax.fori_loop(first, first + count, add, state)
            scale = plgpu.load(v_scale_ref.at[span], layout=registers.BY_ROW, optimized=False)
            factor = registers.across(scale / state.total, sizes.head_dim)
            stage[...] = (state.acc * factor).astype(sizes.dtype)
            lse_stage[...] = state.peak + jnp.log(state.total) * registers.LOG2_E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse_stage, merged_ref.at[index, span])
            _write_heads(sizes, stage, out_ref.at[rows.token[index]], tile)
            plgpu.wait_smem_to_gmem(0)


def _write_heads(sizes: Sizes, stage: Ref, out_ref: Ref, tile: jax.Array) -> None:
    """Writes a tile's groups, of ``group_rows`` each, to the query heads ``[Hq, D]`` of a token."""
    for place in range(ROWS // sizes.group_rows):
        head = tile * (ROWS // sizes.group_rows) + place

        @pl.when(head < sizes.heads)
        def write(place: int = place, head: jax.Array = head) -> None:
            group = stage.at[pl.ds(place * sizes.group_rows, sizes.group)]
            plgpu.copy_smem_to_gmem(group, out_ref.at[pl.ds(head * sizes.group, sizes.group)])


def _clear(out_ref: Ref, stage: Ref, live: Ref, first: jax.Array, tile: jax.Array) -> None:
    """Zeroes those of 64 tokens that are dead, 64 query heads in a copy; the first ``tile`` does it for all."""
    num_tokens, q_heads, _ = out_ref.shape
    start, end = live[0], live[1]
    last = jnp.minimum(first + ROWS, num_tokens)

    @pl.when(((first < start) | (last > end)) & (tile == 0))
    def clear() -> None:
        stage[...] = jnp.zeros(stage.shape, stage.dtype)
        plgpu.commit_smem()

        @pl.loop(first, last)
        def clear_token(token: jax.Array) -> None:
            @pl.when((token < start) | (token >= end))
            def write() -> None:
                for head in range(0, q_heads, ROWS):
                    count = min(ROWS, q_heads - head)
                    plgpu.copy_smem_to_gmem(stage.at[pl.ds(0, count)], out_ref.at[token, pl.ds(head, count)])

        plgpu.wait_smem_to_gmem(0)
