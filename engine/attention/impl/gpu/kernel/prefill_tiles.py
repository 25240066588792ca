"""Prefill: tiles of a sequence's new tokens over its whole context, chunked prefill's cached part included.

A block is a tile of one KV head: one warpgroup fetches steps of 128 tokens, two consume every step, each for 64 query
rows, and take turns so that one computes its softmax while the other uses the matrix unit (FlashAttention-3's
ping-pong). Steps that some row sees in part come first, in a loop with a mask; the others follow in a loop without.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engine.attention.impl.gpu.kernel import registers
from engine.attention.impl.gpu.kernel.pages import SWIZZLED, Ring, drain, fetch_steps, ring_types
from engine.attention.impl.gpu.kernel.registers import Softmax
from engine.attention.impl.gpu.kernel.sizes import CONSUMER_REGISTERS, PRODUCER_REGISTERS, ROWS, Ref, Sizes
from engine.attention.impl.gpu.work import Tiles

CONSUMERS = 2


class _Inputs(NamedTuple):
    q: Ref
    kv: Ref
    table: Ref
    factor: Ref
    v_scale: Ref
    sinks: Ref
    tiles: Tiles


class _Shared(NamedTuple):  # shared memory of a block, and the barriers that guard it
    ring: Ring
    q: Ref
    stage: Ref
    lse: Ref
    q_full: Ref
    turn: Ref


class _Walk(NamedTuple):
    """The steps of a tile: some row sees ``[0, masked)`` in part; every row sees ``[masked, steps)`` whole."""

    row: jax.Array
    first: jax.Array
    whole: jax.Array
    partial: jax.Array
    masked: jax.Array
    steps: jax.Array
    low: jax.Array
    kv_len: jax.Array

    def step(self, index: jax.Array) -> jax.Array:
        """The step of the context that comes ``index``-th: those before ``whole``, those from ``partial``, the rest."""
        before = self.whole - self.first
        edge = jnp.where(index < before, self.first + index, self.partial + index - before)
        return jnp.where(index < self.masked, edge, self.whole + index - self.masked)


def prefill_tiles(
    sizes: Sizes, q: jax.Array, kv: jax.Array, table: jax.Array, factor: Any, v_scale: Any,
    sinks: Any, tiles: Tiles, *, interpret: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attends every tile of every row that has more than one new token.

    Args:
        sizes: the static sizes of the call.
        q: ``[T, Hq, D]`` queries.
        kv: ``[S, H, 2D]`` the cache, the new tokens in it.
        table: ``[B, P]`` int32, see ``fetch_steps``.
        factor: ``[H]`` float32, above 0; makes exponents of 2 of logits.
        v_scale: ``[H]`` float32, makes true values of stored ones.
        sinks: ``[Hq]`` float32, as exponents of 2; read where the call has sinks.
        tiles: the tiles to attend.
        interpret: False, or ``plgpu.InterpretGPUParams``.

    Returns:
        ``out[T, Hq, D]``, in which only the tiles' tokens are written; and each tile's log-sum-exps to base 2,
        ``[N, C, Hq, 64]``, C times 64 tokens per tile.
    """
    capacity = tiles.row.shape[0]
    q_heads = q.shape[1]
    units = q_heads // CONSUMERS if sizes.shares_head else q_heads
    kernel = plgpu.kernel(
        lambda *refs: _body(
            sizes, _Inputs._make([*refs[:6], Tiles(*refs[6:12])]), refs[12:14], _Shared(Ring(*refs[14:17]), *refs[17:])
        ),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((capacity, sizes.tile_tokens // ROWS, q_heads, ROWS), jnp.float32),
        ),
        scratch_types=(
            *ring_types(sizes, sizes.prefill_tokens, sizes.prefill_stages, readers=CONSUMERS),
            plgpu.SMEM((CONSUMERS, ROWS, sizes.head_dim), sizes.dtype, transforms=SWIZZLED),
            plgpu.SMEM((CONSUMERS, ROWS, sizes.head_dim), sizes.dtype),
            plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=CONSUMERS),
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ),
        grid=(units, capacity),
        grid_names=("unit", "tile"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=registers.OPTIONS,
        interpret=interpret,
        kernel_name="prefill_tiles",
    )
    out, lse = kernel(q, kv, table, factor, v_scale, sinks, *tiles)
    return out, lse


def _body(sizes: Sizes, inputs: _Inputs, results: tuple[Ref, ...], shared: _Shared) -> None:
    group = lax.axis_index("warpgroup")
    unit, tile = lax.axis_index("unit"), lax.axis_index("tile")
    head = unit * (CONSUMERS if sizes.shares_head else 1) // sizes.group

    @pl.when(tile < inputs.tiles.count[0])
    def attend() -> None:
        walk = _walk(sizes, inputs.tiles, tile)

        @pl.when(group == CONSUMERS)
        def produce() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            fetch_steps(
                sizes, inputs.kv, inputs.table, shared.ring, 0, walk.steps, row=walk.row, head=head,
                token_of=lambda step: walk.step(step) * sizes.prefill_tokens, alive=(walk.low, walk.kv_len),
            )  # fmt: skip
            drain(shared.ring.empty, walk.steps)

        @pl.when(group < CONSUMERS)
        def consume() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            _consume(sizes, inputs, results, shared, walk, tile, unit, head, group)


def _walk(sizes: Sizes, tiles: Tiles, tile: jax.Array) -> _Walk:
    width = sizes.prefill_tokens
    position, valid = tiles.position[tile], tiles.valid[tile]
    last = position + valid - 1
    low = jnp.int32(0) if sizes.window is None else jnp.maximum(0, position - sizes.window + 1)
    first, end = low // width, (last + width) // width
    whole = first
    if sizes.window is not None:  # the last row's window reaches least far back
        whole = jnp.clip((last - sizes.window + width) // width, first, end)
    partial = jnp.clip((position + 1) // width, whole, end)
    masked = (whole - first) + (end - partial)
    return _Walk(tiles.row[tile], first, whole, partial, masked, end - first, low, tiles.kv_len[tile])


def _consume(
    sizes: Sizes, inputs: _Inputs, results: tuple[Ref, ...], shared: _Shared, walk: _Walk, tile: jax.Array,
    unit: jax.Array, head: jax.Array, me: jax.Array,
) -> None:  # fmt: skip
    q_head = unit * CONSUMERS + me if sizes.shares_head else unit
    skipped = jnp.int32(0) if sizes.shares_head else me * ROWS
    token = inputs.tiles.token[tile] + skipped
    position = inputs.tiles.position[tile] + skipped
    stage, queries = shared.stage.at[me], shared.q.at[me]
    # Through registers: a tile of queries starts at any token, a swizzled copy only at every eighth.
    plgpu.copy_gmem_to_smem(inputs.q.at[pl.ds(token, ROWS), q_head], stage, shared.q_full.at[me])
    plgpu.barrier_wait(shared.q_full.at[me])
    queries[...] = plgpu.load(stage, layout=plgpu.Layout.WGMMA, optimized=False)
    plgpu.commit_smem()

    state = registers.start(sizes)
    if sizes.has_sinks:
        state = registers.start(sizes, inputs.sinks[q_head], 1.0)
    factor = inputs.factor[head]

    pl.when(me == 1)(lambda: _take_turn(shared))

    def attend(index: jax.Array, state: Softmax, masked: bool) -> Softmax:
        return _attend_step(sizes, shared, walk, index, queries, position, factor, state, masked=masked)

    state = lax.fori_loop(0, walk.masked, lambda index, state: attend(index, state, True), state)
    state = lax.fori_loop(walk.masked, walk.steps, lambda index, state: attend(index, state, False), state)

    pl.when(me == 0)(lambda: _take_turn(shared))
    # Rows without a key have a total of 0, and their sums are 0 as well.
    norm = inputs.v_scale[head] / jnp.maximum(state.total, 1e-37)
    stage[...] = (state.acc * registers.across(norm, sizes.head_dim)).astype(sizes.dtype)
    shared.lse[me] = state.peak + jnp.log(state.total) * registers.LOG2_E
    plgpu.commit_smem()
    out_ref, lse_ref = results
    _write_rows(stage, out_ref, token, q_head, jnp.clip(inputs.tiles.valid[tile] - skipped, 0, ROWS))
    which = 0 if sizes.shares_head else me
    plgpu.copy_smem_to_gmem(shared.lse.at[me], lse_ref.at[tile, which, q_head])
    plgpu.wait_smem_to_gmem(0)


def _take_turn(shared: _Shared) -> None:
    plgpu.barrier_arrive(shared.turn)
    plgpu.barrier_wait(shared.turn)


def _attend_step(
    sizes: Sizes, shared: _Shared, walk: _Walk, index: jax.Array, queries: Ref, position: jax.Array, factor: Any,
    state: Softmax, *, masked: bool,
) -> Softmax:  # fmt: skip
    slot = index % shared.ring.empty.shape[0]
    keys, values = shared.ring.halves(slot)
    plgpu.barrier_wait(shared.ring.full.at[slot])
    raw = registers.logits_of(sizes, queries, keys, lambda: _take_turn(shared))
    logits, factor = registers.capped(sizes, raw, factor)
    if masked:
        behind = registers.iota(logits.shape, 0) - registers.iota(logits.shape, 1)  # tokens from a key to its query
        behind += position - walk.step(index) * sizes.prefill_tokens
        seen = behind >= 0
        if sizes.window is not None:
            seen &= behind < sizes.window
        logits = jnp.where(seen, logits, -jnp.inf)
    state, weights = registers.weigh(state, logits, factor)
    narrow = weights.astype(sizes.dtype)
    state, narrow = lax.optimization_barrier((state, narrow))
    _take_turn(shared)
    acc = registers.add_values(sizes, state.acc, narrow, values)
    plgpu.barrier_arrive(shared.ring.empty.at[slot])
    return state._replace(acc=acc)


def _write_rows(stage: Ref, out_ref: Ref, token: jax.Array, q_head: Any, count: jax.Array) -> None:
    """Writes the first ``count`` of 64 rows: the rows after them belong to another tile."""
    size = ROWS
    while size:
        start = count // (2 * size) * (2 * size)

        @pl.when(count // size % 2 == 1)
        def part(size: int = size, start: jax.Array = start) -> None:
            rows = pl.ds(start, size)
            plgpu.copy_smem_to_gmem(stage.at[rows], out_ref.at[pl.ds(token + start, size), q_head])

        size //= 2
