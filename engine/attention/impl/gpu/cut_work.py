"""The work of one step as flat integer arrays of fixed size, made in XLA from the page table and the lengths.

A row of one new token is a decode row and is cut into chunks; a longer row is cut into tiles. The arrays depend on the
step alone, so that XLA computes them once for all layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from engine.attention.impl.gpu.kernel.sizes import Sizes
from engine.attention.impl.gpu.work import Chunks, Rows, StepWork, Tiles
from engine.attention.metadata import AttentionMetadata, running_sum

ROUNDS = 8  # about so many chunks per block where decode rows are few, so that the blocks end nearly together
WHOLE_LOAD = 8  # the page table's columns are a multiple, so that a loop step's page ids come in loads of 16 bytes
STEP_COST = 2  # cost of starting a chunk, in steps of its loop


def cut_work(sizes: Sizes, metadata: AttentionMetadata, *, num_tokens: int, cache_pages: int) -> StepWork:
    """Cuts one step into work of nearly equal parts.

    Values outside their range are cut off here, once per step, so that no copy leaves the arrays whatever a traced step
    holds.

    Args:
        sizes: the static sizes of the call.
        metadata: the sequences of the step.
        num_tokens: T, padding included.
        cache_pages: pages of the cache, the null page included.

    Returns:
        The work; C is the most chunks that B rows are cut into, N the most tiles that T tokens make.
    """
    page_table, cu_q_lens, kv_lens = (
        jnp.asarray(array, jnp.int32) for array in (metadata.page_table, metadata.cu_q_lens, metadata.kv_lens)
    )
    columns = page_table.shape[1]
    cu_q_lens = running_sum(jnp.clip(cu_q_lens, 0, num_tokens))
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    kv_lens = jnp.clip(kv_lens, q_lens, columns * sizes.page_size)
    widest = max(sizes.decode_tokens, sizes.prefill_tokens)
    more = -(-widest // sizes.page_size)
    more += -(columns + more) % WHOLE_LOAD
    held = jnp.arange(columns, dtype=jnp.int32)[None] * sizes.page_size < kv_lens[:, None]
    table = jnp.pad(jnp.where(held, jnp.clip(page_table, 0, cache_pages - 1), 0), ((0, 0), (0, more)))
    chunks, rows = _cut_decode(sizes, cu_q_lens, q_lens, kv_lens, longest=columns * sizes.page_size)
    return StepWork(table, chunks, rows, _cut_prefill(sizes, cu_q_lens, q_lens, kv_lens, num_tokens=num_tokens))


def _cut_decode(
    sizes: Sizes, cu_q_lens: jax.Array, q_lens: jax.Array, kv_lens: jax.Array, *, longest: int
) -> tuple[Chunks, Rows]:
    """Cuts each decode row into chunks of the length at which the blocks are done soonest."""
    batch, width = q_lens.shape[0], sizes.decode_tokens
    capacity = batch + -(-ROUNDS * sizes.blocks // sizes.heads)
    low = jnp.zeros_like(kv_lens) if sizes.window is None else jnp.maximum(0, kv_lens - sizes.window)
    first = low // width
    steps = jnp.where(q_lens == 1, (kv_lens + width - 1) // width - first, 0)
    most = -(-longest // width)
    lengths = sorted({1, *(min(most, base << k) for k in range(most.bit_length()) for base in (2, 3))} | {most})
    candidates = jnp.array(lengths, jnp.int32)
    counts = -(-steps[None] // candidates[:, None]).sum(1)
    rounds = -(-counts * sizes.heads // sizes.blocks)
    cost = jnp.where(counts <= capacity, rounds * (candidates + STEP_COST), jnp.iinfo(jnp.int32).max)
    wanted = candidates[jnp.argmin(cost)]
    parts = -(-steps // wanted)
    length = -(-steps // jnp.maximum(parts, 1))  # the chunks of a row are nearly equal
    parts = -(-steps // jnp.maximum(length, 1))
    ends = jnp.cumsum(parts, dtype=jnp.int32)
    index = jnp.arange(capacity, dtype=jnp.int32)
    # Every pair is compared: a binary search is a loop of tiny programs, before the first layer of each step.
    row = jnp.minimum(jnp.searchsorted(ends, index, side="right", method="compare_all"), batch - 1).astype(jnp.int32)
    begin = first[row] + (index - (ends - parts)[row]) * length[row]
    chunks = Chunks(
        row=row,
        low=jnp.maximum(begin * width, low[row]),
        high=jnp.minimum((begin + length[row]) * width, kv_lens[row]),
        count=ends[-1:],
    )
    token = cu_q_lens[:-1]
    return chunks, Rows(ends - parts, parts.astype(jnp.int32), token, jnp.stack([cu_q_lens[0], cu_q_lens[-1]]))


def _cut_prefill(
    sizes: Sizes, cu_q_lens: jax.Array, q_lens: jax.Array, kv_lens: jax.Array, *, num_tokens: int
) -> Tiles:
    """Cuts longer rows into tiles; a sequence's last tile, which sees most, comes first."""
    batch, width = q_lens.shape[0], sizes.tile_tokens
    capacity = max(1, num_tokens // width + min(batch, num_tokens // 2))
    counts = jnp.where(q_lens > 1, -(-q_lens // width), 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    index = jnp.arange(capacity, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, index, side="right", method="compare_all"), batch - 1).astype(jnp.int32)
    skipped = jnp.maximum((ends[row] - 1 - index) * width, 0)
    return Tiles(
        row=row,
        token=cu_q_lens[row] + skipped,
        valid=jnp.clip(q_lens[row] - skipped, 0, width),
        position=kv_lens[row] - q_lens[row] + skipped,
        kv_len=kv_lens[row],
        count=ends[-1:],
    )
