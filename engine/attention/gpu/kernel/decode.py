"""Decode: one query a sequence, its context cut into chunks that fill the device (flash-decoding's split-K).

As many blocks as there are multiprocessors walk the list of (chunk, KV head). In each one warpgroup fetches and two
consume: steps of 64 tokens go to them in turn, each has its own softmax, and at the end of a chunk the second hands its
state to the first, which writes the chunk's partial result. The fetching warpgroup runs ahead across chunks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engine.attention.gpu.kernel import registers
from engine.attention.gpu.kernel.pages import copies_of, fetch, pages_of
from engine.attention.gpu.kernel.registers import Softmax
from engine.attention.gpu.kernel.sizes import CONSUMER_REGISTERS, PRODUCER_REGISTERS, ROWS, Sizes

Ref = Any  # a Pallas memory reference; jax has no public type for it
CONSUMERS = 2


class Chunks(NamedTuple):
    """The decode rows of a step, cut up; int32.

    Attributes:
        row: ``[C]`` of the page table.
        low: ``[C]`` first position of the chunk that the query sees.
        high: ``[C]`` one past the last.
        count: ``[1]`` chunks that there are.
    """

    row: Any
    low: Any
    high: Any
    count: Any


class _Shared(NamedTuple):
    """Shared memory of a block, and the barriers that hand it from one warpgroup to another."""

    kv: Ref
    q: Ref
    part: Ref
    stats: Ref
    lse: Ref
    kv_full: Ref
    kv_empty: Ref
    q_full: Ref
    q_empty: Ref
    handed: Ref
    taken: Ref


class _Item(NamedTuple):
    """A chunk of one KV head: steps ``[first, first + steps)`` of its sequence."""

    chunk: jax.Array
    head: jax.Array
    row: jax.Array
    low: jax.Array
    high: jax.Array
    first: jax.Array
    steps: jax.Array


def decode_chunks(
    sizes: Sizes, q: jax.Array, kv: jax.Array, table: jax.Array, factor: jax.Array, chunks: Chunks, *, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Attends every chunk of every decode row.

    Args:
        sizes: of the call.
        q: ``[B, H, G', D]`` the query of each row by KV head, G' rows of which G count.
        kv: ``[S, H, 2D]`` the cache.
        table: ``[B, P]`` int32, see ``fetch``.
        factor: ``[H]`` float32, makes powers of two of logits; above 0.
        chunks: the work.
        interpret: False, or ``plgpu.InterpretGPUParams``.

    Returns:
        ``[C, R, D]`` float32 results of each chunk alone, and their log-sum-exps ``[C, R]`` to base 2. Chunks past the
        count, and rows past a group, hold anything.
    """
    capacity = chunks.row.shape[0]
    tokens, wide = sizes.decode_tokens, 2 * sizes.head_dim
    slots = CONSUMERS * sizes.decode_stages
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    barrier = plgpu.Barrier
    kernel = plgpu.kernel(
        lambda *refs: _body(sizes, refs[:8], refs[8:10], _Shared(*refs[10:])),
        out_type=(
            jax.ShapeDtypeStruct((capacity, sizes.part_rows, sizes.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((capacity, sizes.part_rows), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM((slots, tokens, wide), sizes.dtype, transforms=tiled),
            plgpu.SMEM((2, ROWS, sizes.head_dim), sizes.dtype, transforms=tiled),
            plgpu.SMEM((ROWS, sizes.head_dim), jnp.float32),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            barrier(num_arrivals=copies_of(sizes, tokens), num_barriers=slots + 1),
            barrier(num_barriers=slots),
            barrier(num_barriers=2),
            barrier(num_arrivals=CONSUMERS, num_barriers=2),
            barrier(),
            barrier(),
        ),
        grid=(sizes.blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
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
    # Heads in turn, so that blocks beside each other read neighbouring bytes.
    chunk, head = index // sizes.heads, index % sizes.heads
    low, high = chunks.low[chunk], chunks.high[chunk]
    first = low // sizes.decode_tokens
    steps = (high + sizes.decode_tokens - 1) // sizes.decode_tokens - first
    return _Item(chunk, head, chunks.row[chunk], low, high, first, steps)


def _produce(
    sizes: Sizes, q_ref: Ref, kv_ref: Ref, table_ref: Ref, shared: _Shared, item_of: Any, mine: jax.Array
) -> None:
    slots = shared.kv.shape[0]

    def fetch_item(index: jax.Array, done: jax.Array) -> jax.Array:
        item, place = item_of(index), index % 2

        @pl.when(index >= 2)
        def wait_for_place() -> None:
            plgpu.barrier_wait(shared.q_empty.at[place])

        rows = shared.q.at[place, pl.ds(0, sizes.group_rows)]
        plgpu.copy_gmem_to_smem(q_ref.at[item.row, item.head], rows, shared.q_full.at[place])

        @pl.loop(0, item.steps)
        def fetch_step(index: jax.Array) -> None:
            slot, token = (done + index) % slots, (item.first + index) * sizes.decode_tokens
            pages = pages_of(sizes, table_ref, item.row, token, sizes.decode_tokens)

            @pl.when(done + index >= slots)
            def wait_for_slot() -> None:
                plgpu.barrier_wait(shared.kv_empty.at[slot])

            fetch(
                sizes, kv_ref, pages, (shared.kv, shared.kv_full), slot, head=item.head, token=token,
                alive=(item.low, item.high),
            )  # fmt: skip

        return done + item.steps

    done = lax.fori_loop(0, mine, fetch_item, jnp.int32(0))

    # What the consumers still hand back is waited for: a barrier must be at rest when its block ends.
    @pl.loop(jnp.maximum(0, done - slots), done)
    def drain_kv(index: jax.Array) -> None:
        plgpu.barrier_wait(shared.kv_empty.at[index % slots])

    @pl.loop(jnp.maximum(0, mine - 2), mine)
    def drain_q(index: jax.Array) -> None:
        plgpu.barrier_wait(shared.q_empty.at[index % 2])


def _consume(
    sizes: Sizes, factor_ref: Ref, results: tuple[Ref, ...], shared: _Shared, item_of: Any, mine: jax.Array, me: int
) -> None:
    def attend_item(index: jax.Array, done: jax.Array) -> jax.Array:
        item, place = item_of(index), index % 2
        factor = factor_ref[item.head]
        plgpu.barrier_wait(shared.q_full.at[place])
        mine_first = (me + done) % CONSUMERS  # of the item's steps, the first that comes to this consumer
        count = (item.steps - mine_first + CONSUMERS - 1) // CONSUMERS
        state = lax.fori_loop(
            0,
            count,
            lambda turn, state: _attend_step(
                sizes, shared, item, mine_first + turn * CONSUMERS, done, place, factor, state
            ),
            registers.start(sizes),
        )
        plgpu.barrier_arrive(shared.q_empty.at[place])
        if me == 0:
            _finish(sizes, results, shared, item, state)
        else:
            _hand_over(shared, index, state)
        return done + item.steps

    lax.fori_loop(0, mine, attend_item, jnp.int32(0))
    if me == 1:

        @pl.when(mine > 0)
        def drain() -> None:
            plgpu.barrier_wait(shared.taken)


def _attend_step(
    sizes: Sizes, shared: _Shared, item: _Item, step: jax.Array, done: jax.Array, place: jax.Array, factor: Any,
    state: Softmax,
) -> Softmax:  # fmt: skip
    slot = (done + step) % shared.kv.shape[0]
    keys = shared.kv.at[slot, :, pl.ds(0, sizes.head_dim)]
    values = shared.kv.at[slot, :, pl.ds(sizes.head_dim, sizes.head_dim)]
    plgpu.barrier_wait(shared.kv_full.at[slot])
    raw = registers.logits_of(sizes, shared.q.at[place], keys)
    logits, factor = registers.capped(sizes, raw, factor)
    token = (item.first + step) * sizes.decode_tokens
    low, high = item.low - token, item.high - token
    column = registers.iota(logits.shape, 1)
    logits = jnp.where((column >= low) & (column < high), logits, -jnp.inf)

    state, weights = registers.weigh(state, logits, factor)
    acc = registers.add_values(sizes, state.acc, weights.astype(sizes.dtype), values)
    plgpu.barrier_arrive(shared.kv_empty.at[slot])
    return state._replace(acc=acc)


def _hand_over(shared: _Shared, index: jax.Array, state: Softmax) -> None:
    """Gives this consumer's state to the other."""

    @pl.when(index > 0)
    def wait_for_place() -> None:
        plgpu.barrier_wait(shared.taken)

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
    share = 1 / total
    width = sizes.head_dim
    shared.part[...] = state.acc * registers.across(ours * share, width) + theirs.acc * registers.across(
        other * share, width
    )
    shared.lse[...] = peak + jnp.log(total) * registers.LOG2_E
    plgpu.commit_smem()
    rows = pl.ds(pl.multiple_of(item.head * sizes.group_rows, 8), sizes.group_rows)
    live = pl.ds(0, sizes.group_rows)
    plgpu.copy_smem_to_gmem(shared.part.at[live], part_ref.at[item.chunk, rows])
    plgpu.copy_smem_to_gmem(shared.lse.at[live], lse_ref.at[item.chunk, rows])
    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_arrive(shared.taken)
