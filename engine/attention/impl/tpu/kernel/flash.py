"""Online softmax over one chunk of keys (FlashAttention-2), float32 state, in the log2 domain.

q comes scaled by ``sm_scale * log2(e)``, so that the exponential is the chip's exp2. The row sum stays spread over 128
lanes until the end: only the maximum needs a reduction across lanes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engine.attention.impl.tpu.kernel.geometry import Geometry, Tile
from engine.attention.impl.tpu.kernel.items import Item, Scalar
from engine.attention.impl.tpu.kernel.packed_rows import Ref, load_kv, load_queries
from engine.kv.layout import LANES

LOG2_E = 1.4426950408889634
# The maximum of a row whose keys so far are all masked; exp2(MASKED - m) = 0 later wipes what the row has summed.
MASKED = -1e30
DECODE_LAG = 4  # heads between the use of a head's keys and that of its values


class State(NamedTuple):
    """Softmax state of the rows of each KV head, float32 refs in VMEM."""

    peak: Ref  # [H, rows, 128] running maximum, the same in every lane
    total: Ref  # [H, rows, 128] running sum, spread over the lanes
    acc: Ref  # [H, rows, D']


def reset(state: State, rows: int, sinks: Ref | None) -> None:
    """Starts anew; a sink is a logit that counts from the start and has no value.

    Args:
        state: the state.
        rows: rows of the state that an item takes.
        sinks: ``[H, R, 128]`` float32 in the log2 domain, R rows that repeat, in whole groups and sublanes; or None.
    """
    heads = state.peak.shape[0]
    state.acc[:, :rows] = jnp.zeros((heads, rows, state.acc.shape[2]), jnp.float32)
    shape = (heads, rows, LANES)
    if sinks is None:
        state.peak[:, :rows] = jnp.full(shape, MASKED, jnp.float32)
        state.total[:, :rows] = jnp.zeros(shape, jnp.float32)
        return
    period = min(rows, sinks.shape[1])
    repeated = jnp.broadcast_to(sinks[:, :period][:, None], (heads, rows // period, period, LANES))
    state.peak[:, :rows] = repeated.reshape(shape)
    state.total[:, :rows] = jnp.where(jax.lax.broadcasted_iota(jnp.int32, shape, 2) == 0, 1.0, 0.0)


def result(state: State, head: Scalar, rows: int) -> tuple[jax.Array, jax.Array]:
    """Attention output ``[rows, D']`` and log-sum-exp ``[rows, 128]`` (natural log) of one head, float32.

    A row that has seen no key has output 0 and minus infinity.
    """
    total = jnp.sum(state.total[head, :rows], axis=-1, keepdims=True)
    peak = state.peak[head, :rows]
    seen = peak[:, :1] > MASKED
    lse = jnp.where(seen, (peak + jnp.log2(total)) / LOG2_E, -jnp.inf)
    return jnp.where(seen, state.acc[head, :rows] / total, 0.0), lse


def scores(geo: Geometry, q: jax.Array, k: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Logits ``[rows, tokens]`` float32 in the log2 domain."""
    s = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), precision=geo.precision, preferred_element_type=jnp.float32)
    if geo.soft_cap is not None:
        s = (geo.soft_cap * LOG2_E) * jnp.tanh(s)
    return s if mask is None else jnp.where(mask, s, MASKED)


def update_softmax(geo: Geometry, s: jax.Array, state: State, head: Scalar) -> tuple[jax.Array, jax.Array]:
    """Updates maximum and sum by one chunk.

    Returns:
        The factor ``[rows, 128]`` by which the accumulator shrinks, and the probabilities ``[rows, tokens]``.
    """
    columns = [s[:, i : i + LANES] for i in range(0, s.shape[1], LANES)]
    highest = columns[0]
    for column in columns[1:]:
        highest = jnp.maximum(highest, column)
    top = jnp.max(highest, axis=-1, keepdims=True)
    rows = s.shape[0]
    before = state.peak[head, :rows]
    peak = jnp.maximum(before, jnp.broadcast_to(top, before.shape))
    shrink = jnp.exp2(before - peak)
    p = [jnp.exp2(column - peak) for column in columns]
    state.total[head, :rows] = shrink * state.total[head, :rows] + sum(p[1:], p[0])
    state.peak[head, :rows] = peak
    return shrink, jnp.concatenate([x.astype(geo.compute_dtype) for x in p], axis=1)


def accumulate(geo: Geometry, state: State, head: Scalar, shrink: jax.Array, p: jax.Array, v: jax.Array) -> None:
    """Adds ``p @ v`` to the shrunk accumulator."""
    pv = jnp.dot(p, v, precision=geo.precision, preferred_element_type=jnp.float32)
    folds = geo.lanes // LANES
    wide = shrink if folds == 1 else jnp.concatenate([shrink] * folds, axis=1)
    state.acc[head, : len(pv)] = wide * state.acc[head, : len(pv)] + pv


def key_positions(start: Scalar, shape: tuple[int, int], axis: int) -> jax.Array:
    """Positions of a chunk's keys along ``axis``, int32."""
    positions: jax.Array = start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return positions


def visible(geo: Geometry, item: Item, start: Scalar, shape: tuple[int, int]) -> jax.Array:
    """Which keys each row sees, bool ``[rows, tokens]``: none after its query, none before its window.

    Args:
        geo: the kernel's sizes.
        item: the queries.
        start: position of the chunk's first key.
        shape: (rows, tokens).
    """
    keys = key_positions(start, shape, 1)
    query = item.position + jax.lax.broadcasted_iota(jnp.int32, shape, 0) // geo.group
    seen: jax.Array = keys <= query
    return seen if geo.window is None else seen & (keys > query - geo.window)


def fetched(geo: Geometry, item: Item, start: Scalar, tokens: int) -> jax.Array:
    """Which tokens of a chunk some query sees, bool ``[tokens, D']``: the rest of VMEM may hold anything, NaN too."""
    keys = key_positions(start, (tokens, geo.lanes), 0)
    inside: jax.Array = (keys >= item.low) & (keys < item.high)
    return inside


def attend(
    geo: Geometry, tile: Tile, pages: Ref, q: Ref, state: State, item: Item, start: Scalar, *, edge: bool
) -> None:
    """Attends one chunk of one item: all heads unrolled for a decode row, else in a loop over the heads.

    Unrolled, the values of a head are used some heads after its keys, so that the matrix unit works on one head's
    logits while another's are in the softmax; the compiler loads V again where registers run out rather than spill.

    Args:
        geo: the kernel's sizes.
        tile: how this kind of item is computed.
        pages: ``[chunk pages, page_size, stride, p, 128]`` in VMEM.
        q: ``[H, queries, G / p, p, D']`` in VMEM.
        state: softmax state.
        item: the queries.
        start: position of the chunk's first key.
        edge: whether some query does not see some key of the chunk.
    """
    tokens = tile.chunk_pages * geo.page_size

    def weigh(head: Scalar) -> tuple[jax.Array, jax.Array, jax.Array]:
        keep = fetched(geo, item, start, tokens) if edge else None
        mask = visible(geo, item, start, (tile.rows, tokens)) if edge else None
        k, v = load_kv(geo, pages, head, keep)
        s = scores(geo, load_queries(geo, q.at[head], tile.rows), k, mask)
        return *update_softmax(geo, s, state, head), v

    if tile.queries > 1:
        jax.lax.fori_loop(0, geo.heads, lambda head, _: accumulate(geo, state, head, *weigh(head)), None)
        return
    late: list[tuple[Any, ...]] = []
    for head in range(geo.heads):
        late.append((head, *weigh(head)))
        if len(late) > DECODE_LAG:
            accumulate(geo, state, *late.pop(0))
    for weighed in late:
        accumulate(geo, state, *weighed)
