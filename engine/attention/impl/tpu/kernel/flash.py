"""Online softmax over one chunk of keys (FlashAttention-2), float32 state, in the log2 domain.

q comes scaled by ``sm_scale * log2(e)``, for the chip's exp2. The row sum stays spread over 128 lanes until the end.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from engine.attention.impl.tpu.contract.geometry import Geometry, Tile
from engine.attention.impl.tpu.contract.scratch import Ref, State
from engine.attention.impl.tpu.contract.step_plan import Scalar
from engine.attention.impl.tpu.kernel.items import Item
from engine.attention.impl.tpu.kernel.packed_rows import load_kv
from engine.attention.impl.tpu.kernel.query_rows import load_queries
from engine.kv.layout import LANES, SUBLANES

LOG2_E = 1.4426950408889634
# The maximum of a row whose keys so far are all masked; exp2(MASKED - m) = 0 later wipes what the row has summed.
MASKED = -1e30
DECODE_LAG = 4  # heads between the use of a head's keys and that of its values


def reset(geo: Geometry, tile: Tile, state: State, sinks: Ref | None) -> None:
    """Starts anew; a sink is a logit that counts from the start and has no value.

    The sinks are ``[H, G / p, 8, 128]`` float32 in the log2 domain, of each word of q its p sinks again and again.
    """
    shape = (geo.heads, tile.rows, LANES)
    state.acc[:, : tile.rows] = jnp.zeros((*shape[:2], geo.lanes), jnp.float32)
    state.peak[:, : tile.rows] = jnp.full(shape, MASKED, jnp.float32)
    if sinks is None:
        state.total[:, : tile.rows] = jnp.zeros(shape, jnp.float32)
        return
    state.total[:, : tile.rows] = jnp.where(jax.lax.broadcasted_iota(jnp.int32, shape, 2) == 0, 1.0, 0.0)
    span, size = tile.queries * geo.io_pack, min(tile.queries * geo.io_pack, SUBLANES)
    for word in range(geo.group_words):
        again = jnp.broadcast_to(sinks[:, word, :size][:, None], (geo.heads, span // size, size, LANES))
        state.peak[:, word * span : (word + 1) * span] = again.reshape(geo.heads, span, LANES)


def result(state: State, head: Scalar, rows: int) -> tuple[jax.Array, jax.Array]:
    """Output ``[rows, D']`` and natural log-sum-exp ``[rows, 128]`` of a head, float32; 0 and -inf without a key."""
    total = jnp.sum(state.total[head, :rows], axis=-1, keepdims=True)
    peak = state.peak[head, :rows]
    seen = peak[:, :1] > MASKED
    lse = jnp.where(seen, (peak + jnp.log2(total)) / LOG2_E, -jnp.inf)
    return jnp.where(seen, state.acc[head, :rows] / total, 0.0), lse


def scores(geo: Geometry, q: jax.Array, k: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Logits ``[rows, tokens]`` float32 in the log2 domain; the mask is the same for the rows of each word of q."""
    s = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), precision=geo.precision, preferred_element_type=jnp.float32)
    if geo.soft_cap is not None:
        s = (geo.soft_cap * LOG2_E) * jnp.tanh(s)
    if mask is None:
        return s
    parts = [jnp.where(mask, s[i : i + len(mask)], MASKED) for i in range(0, len(s), len(mask))]
    return jnp.concatenate(parts, axis=0)


def update_softmax(geo: Geometry, s: jax.Array, state: State, head: Scalar) -> tuple[jax.Array, jax.Array]:
    """Updates maximum and sum; returns the factor ``[rows, 128]`` of the sums, and weights ``[rows, tokens]``."""
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


def visible(geo: Geometry, tile: Tile, item: Item, start: Scalar, tokens: int) -> Any:
    """Which keys each row of a word sees, bool ``[rows, tokens]``: none after its query, none before its window.

    All rows of a decode row are of one query. The chunk's first key is at position ``start``.
    """
    shape = (tile.rows if tile.queries == 1 else tile.queries * geo.io_pack, tokens)
    keys, query = key_positions(start, shape, 1), item.position
    if tile.queries > 1:
        query += jax.lax.broadcasted_iota(jnp.int32, shape, 0) // geo.io_pack
    seen = keys <= query
    return seen if geo.window is None else seen & (keys > query - geo.window)


def fetched(geo: Geometry, item: Item, start: Scalar, tokens: int) -> Any:
    """Which tokens of a chunk some query sees, bool ``[tokens, D']``: the rest of VMEM may hold anything, NaN too."""
    keys = key_positions(start, (tokens, geo.lanes), 0)
    return (keys >= item.low) & (keys < item.high)


def attend(
    geo: Geometry, tile: Tile, pages: Ref, q: Ref, state: State, item: Item, start: Scalar, *, edge: bool
) -> None:
    """Attends one chunk of one item, the heads unrolled for a decode row, else in a loop.

    Unrolled, the values of a head are used some heads after its keys, so that the matrix unit works on one head's
    logits while another's are in the softmax; the compiler loads V again where registers run out rather than spill.
    The chunk's first key is at position ``start``; at an edge some query does not see some key of the chunk.
    """
    tokens = pages.shape[0] * geo.page_size

    def weigh(head: Scalar) -> tuple[jax.Array, jax.Array, jax.Array]:
        keep = fetched(geo, item, start, tokens) if edge else None
        mask = visible(geo, tile, item, start, tokens) if edge else None
        k, v = load_kv(geo, pages, head, keep)
        s = scores(geo, load_queries(geo, q, head, tile), k, mask)
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
