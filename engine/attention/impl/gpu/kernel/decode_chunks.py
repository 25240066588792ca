"""Decode: one query per sequence, its context cut into chunks that fill the device (flash-decoding's split-K).

As many blocks as there are multiprocessors walk the list of (chunk, KV head). In each block one warpgroup fetches and
two consume: steps of 64 tokens go to them in turn, each has its own softmax, and at the end of a chunk the second gives
its state to the first, which writes the chunk's partial result. The fetching warpgroup runs ahead across chunks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engine.attention.impl.gpu.kernel import registers
from engine.attention.impl.gpu.kernel.pages import SWIZZLED, Ring, drain, fetch_steps, ring_types, wait_if
from engine.attention.impl.gpu.kernel.registers import Softmax
from engine.attention.impl.gpu.kernel.sizes import CONSUMER_REGISTERS, PRODUCER_REGISTERS, ROWS, Ref, Sizes
from engine.attention.impl.gpu.work import Chunks

CONSUMERS = 2


class _Shared(NamedTuple):  # shared memory of a block, and the barriers that guard it
    ring: Ring
    q: Ref
    part: Ref
    stats: Ref
    lse: Ref
    q_full: Ref
    q_empty: Ref
    handed: Ref
    taken: Ref


class _Item(NamedTuple):  # a chunk of one KV head: steps [first, first + steps) of its sequence
    chunk: jax.Array
    head: jax.Array
    row: jax.Array
    low: jax.Array
    high: jax.Array
    first: jax.Array
    steps: jax.Array


def decode_chunks(
    sizes: Sizes, q: jax.Array, kv: jax.Array, table: jax.Array, factor: Any, chunks: Chunks, *, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Attends every chunk of every decode row.

    Args:
        sizes: the static sizes of the call.
        q: ``[B, H, G', D]`` the query of each row by KV head; of G' rows the first G count.
        kv: ``[S, H, 2D]`` the cache.
        table: ``[B, P]`` int32, see ``fetch_steps``.
        factor: ``[H]`` float32, above 0; makes exponents of 2 of logits.
        chunks: the chunks to attend.
        interpret: False, or ``plgpu.InterpretGPUParams``.

    Returns:
        ``[C * H * G' + 64, D]`` float32 results of each chunk alone, and their log-sum-exps to base 2. Chunks past the
        count, and rows past a group, hold anything.
    """
    rows = chunks.row.shape[0] * sizes.chunk_rows + ROWS  # the last tile that is read may reach past the last chunk
    kernel = plgpu.kernel(
        lambda *refs: _body(sizes, refs[:8], refs[8:10], _Shared(Ring(*refs[10:13]), *refs[13:])),
        out_type=(
            jax.ShapeDtypeStruct((rows, sizes.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ),
        scratch_types=(
            # Steps of even index go to one consumer, and so do places; each consumer has equally many.
            *ring_types(sizes, sizes.decode_tokens, CONSUMERS * sizes.decode_stages, readers=1),
            plgpu.SMEM((2, ROWS, sizes.head_dim), sizes.dtype, transforms=SWIZZLED),
            plgpu.SMEM((ROWS, sizes.head_dim), jnp.float32),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=2),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ),
        grid=(sizes.blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=registers.OPTIONS,
        interpret=interpret,
        kernel_name="decode_chunks",
    )
    part, lse = kernel(q, kv, table, factor, *chunks)
    return part, lse


def _body(sizes: Sizes, inputs: tuple[Ref, ...], results: tuple[Ref, ...], shared: _Shared) -> None:
    q_ref, kv_ref, table_ref, factor_ref, *chunk_refs = inputs
    chunks = Chunks(*chunk_refs)
    group = lax.axis_index("warpgroup")
    block = lax.axis_index("block")
    total = chunks.count[0] * sizes.heads
    mine = jnp.maximum(0, (total - block + sizes.blocks - 1) // sizes.blocks)

    def item_of(index: jax.Array) -> _Item:
        return _item(sizes, chunks, block + index * sizes.blocks)

    @pl.when(group == CONSUMERS)
    def produce() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(sizes, q_ref, kv_ref, table_ref, shared, item_of, mine)

    for consumer in range(CONSUMERS):

        @pl.when(group == consumer)
        def consume(consumer: int = consumer) -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            _consume(sizes, factor_ref, results, shared, item_of, mine, consumer)


def _item(sizes: Sizes, chunks: Chunks, index: jax.Array) -> _Item:
    # Heads come in turn, so that neighbouring blocks read neighbouring bytes.
    chunk, head = index // sizes.heads, index % sizes.heads
    low, high = chunks.low[chunk], chunks.high[chunk]
    first = low // sizes.decode_tokens
    steps = (high + sizes.decode_tokens - 1) // sizes.decode_tokens - first
    return _Item(chunk, head, chunks.row[chunk], low, high, first, steps)


def _produce(
    sizes: Sizes, q_ref: Ref, kv_ref: Ref, table_ref: Ref, shared: _Shared, item_of: Any, mine: jax.Array
) -> None:
    def fetch_item(index: jax.Array, done: jax.Array) -> Any:
        item, place = item_of(index), index % 2
        wait_if(index >= 2, shared.q_empty.at[place])
        rows = shared.q.at[place, pl.ds(0, sizes.group_rows)]
        plgpu.copy_gmem_to_smem(q_ref.at[item.row, item.head], rows, shared.q_full.at[place])
        fetch_steps(
            sizes, kv_ref, table_ref, shared.ring, done, item.steps, row=item.row, head=item.head,
            token_of=lambda step: (item.first + step) * sizes.decode_tokens, alive=(item.low, item.high),
        )  # fmt: skip
        return done + item.steps

    drain(shared.ring.empty, lax.fori_loop(0, mine, fetch_item, jnp.int32(0)))
    drain(shared.q_empty, mine)


def _consume(
    sizes: Sizes, factor_ref: Ref, results: tuple[Ref, ...], shared: _Shared, item_of: Any, mine: jax.Array, me: int
) -> None:
    def attend_item(index: jax.Array, done: jax.Array) -> Any:
        item, place = item_of(index), index % 2
        factor = factor_ref[item.head]
        plgpu.barrier_wait(shared.q_full.at[place])
        mine_first = (me + done) % CONSUMERS  # the first of the item's steps that this consumer attends
        count = (item.steps - mine_first + CONSUMERS - 1) // CONSUMERS

        def attend(turn: jax.Array, state: Softmax) -> Softmax:
            return _attend_step(sizes, shared, item, mine_first + turn * CONSUMERS, done, place, factor, state)

        state = lax.fori_loop(0, count, attend, registers.start(sizes))
        plgpu.barrier_arrive(shared.q_empty.at[place])
        if me == 0:
            _finish(sizes, results, shared, item, state)
        else:
            _hand_over(shared, index, state)
        return done + item.steps

    lax.fori_loop(0, mine, attend_item, jnp.int32(0))
    if me == 1:
        wait_if(mine > 0, shared.taken)


def _attend_step(
    sizes: Sizes, shared: _Shared, item: _Item, step: jax.Array, done: jax.Array, place: jax.Array, factor: Any,
    state: Softmax,
) -> Softmax:  # fmt: skip
    slot = (done + step) % shared.ring.empty.shape[0]
    keys, values = shared.ring.halves(slot)
    plgpu.barrier_wait(shared.ring.full.at[slot])
    raw = registers.logits_of(sizes, shared.q.at[place], keys)
    logits, factor = registers.capped(sizes, raw, factor)
    token = (item.first + step) * sizes.decode_tokens
    low, high = item.low - token, item.high - token
    column = registers.iota(logits.shape, 1)
    logits = jnp.where((column >= low) & (column < high), logits, -jnp.inf)
    state, weights = registers.weigh(state, logits, factor)
    acc = registers.add_values(sizes, state.acc, weights.astype(sizes.dtype), values)
    plgpu.barrier_arrive(shared.ring.empty.at[slot])
    return state._replace(acc=acc)


def _hand_over(shared: _Shared, index: jax.Array, state: Softmax) -> None:
    """Gives this consumer's state to the other consumer."""
    wait_if(index > 0, shared.taken)
    shared.part[...] = state.acc
    shared.stats[0] = state.peak
    shared.stats[1] = state.total
    plgpu.barrier_arrive(shared.handed)


def _finish(sizes: Sizes, results: tuple[Ref, ...], shared: _Shared, item: _Item, state: Softmax) -> None:
    """Joins the other consumer's state to this one's, and writes the chunk's result."""
    part_ref, lse_ref = results
    plgpu.barrier_wait(shared.handed)
    theirs = Softmax(
        plgpu.load(shared.part, layout=plgpu.Layout.WGMMA, optimized=False),
        plgpu.load(shared.stats.at[0], layout=registers.BY_ROW, optimized=False),
        plgpu.load(shared.stats.at[1], layout=registers.BY_ROW, optimized=False),
    )
    peak = jnp.maximum(state.peak, theirs.peak)
    ours, other = jnp.exp2(state.peak - peak), jnp.exp2(theirs.peak - peak)
    total = state.total * ours + theirs.total * other
    inverse, width = 1 / total, sizes.head_dim
    shared.part[...] = state.acc * registers.across(ours * inverse, width) + theirs.acc * registers.across(
        other * inverse, width
    )
    shared.lse[...] = peak + jnp.log(total) * registers.LOG2_E
    plgpu.commit_smem()
    first = item.chunk * sizes.chunk_rows + item.head * sizes.group_rows
    rows = pl.ds(pl.multiple_of(first, 8), sizes.group_rows)
    live = pl.ds(0, sizes.group_rows)
    plgpu.copy_smem_to_gmem(shared.part.at[live], part_ref.at[rows])
    plgpu.copy_smem_to_gmem(shared.lse.at[live], lse_ref.at[rows])
    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_arrive(shared.taken)
