"""Online softmax over one chunk of keys (FlashAttention-2), float32 state, in the log2 domain.

q comes scaled by ``sm_scale * log2(e)``, so that the exponential is the chip's exp2. The row sum stays spread over 128
lanes until the end: only the maximum needs a reduction across lanes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engine.attention.tpu.geometry import LANES, Geometry
from engine.attention.tpu.registers import Ref, load_kv
from engine.attention.tpu.transfer import Item, Scalar

LOG2_E = 1.4426950408889634
# A row whose keys so far are all masked has this maximum; what it summed is wiped by exp2(MASKED - m) = 0 later.
MASKED = -1e30


class State(NamedTuple):
    """Softmax state of the rows of each KV head, float32 refs in VMEM."""

    peak: Ref  # [H, rows, 128] running maximum, the same in every lane
    total: Ref  # [H, rows, 128] running sum, spread over the lanes
    acc: Ref  # [H, rows, D']


def reset(state: State, sinks: Ref | None) -> None:
    """Starts anew; a sink is a logit that is there from the start and has no value.

    Args:
        state: the state.
        sinks: ``[H, rows, 128]`` float32 in the log2 domain, or None.
    """
    state.acc[...] = jnp.zeros_like(state.acc)
    if sinks is None:
        state.peak[...] = jnp.full_like(state.peak, MASKED)
        state.total[...] = jnp.zeros_like(state.total)
        return
    state.peak[...] = sinks[...]
    lane = jax.lax.broadcasted_iota(jnp.int32, state.total.shape, 2)
    state.total[...] = jnp.where(lane == 0, 1.0, 0.0)


def result(state: State, head: Any) -> tuple[jax.Array, jax.Array]:
    """Attention output ``[rows, D']`` and log-sum-exp ``[rows, 128]`` (natural log) of one head, float32.

    A row that has seen no key has output 0 and minus infinity.
    """
    total = jnp.sum(state.total[head], axis=-1, keepdims=True)
    peak = state.peak[head]
    seen = peak[:, :1] > MASKED
    lse = jnp.where(seen, (peak + jnp.log2(total)) / LOG2_E, -jnp.inf)
    return jnp.where(seen, state.acc[head] / total, 0.0), lse


def scores(geo: Geometry, q: jax.Array, k: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Logits ``[rows, tokens]`` float32 in the log2 domain."""
    s = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), precision=geo.precision, preferred_element_type=jnp.float32)
    if geo.soft_cap is not None:
        s = (geo.soft_cap * LOG2_E) * jnp.tanh(s)
    return s if mask is None else jnp.where(mask, s, MASKED)


def update_softmax(geo: Geometry, s: jax.Array, state: State, head: Any) -> tuple[jax.Array, jax.Array]:
    """Moves maximum and sum on by one chunk.

    Returns:
        The factor ``[rows, 128]`` by which the accumulator shrinks, and the probabilities ``[rows, tokens]``.
    """
    columns = [s[:, i : i + LANES] for i in range(0, s.shape[1], LANES)]
    highest = columns[0]
    for column in columns[1:]:
        highest = jnp.maximum(highest, column)
    top = jnp.max(highest, axis=-1, keepdims=True)
    before = state.peak[head]
    peak = jnp.maximum(before, jnp.broadcast_to(top, before.shape))
    shrink = jnp.exp2(before - peak)
    p = [jnp.exp2(column - peak) for column in columns]
    state.total[head] = shrink * state.total[head] + sum(p[1:], p[0])
    state.peak[head] = peak
    return shrink, jnp.concatenate([x.astype(geo.compute_dtype) for x in p], axis=1)


def accumulate(geo: Geometry, shrink: jax.Array, p: jax.Array, v: jax.Array, state: State, head: Any) -> None:
    """Adds ``p @ v`` to the shrunk accumulator."""
    pv = jnp.dot(p, v, precision=geo.precision, preferred_element_type=jnp.float32)
    folds = geo.lanes // LANES
    wide = shrink if folds == 1 else jnp.concatenate([shrink] * folds, axis=1)
    state.acc[head] = wide * state.acc[head] + pv


def key_positions(start: Scalar, shape: tuple[int, int], axis: int) -> jax.Array:
    """Positions of a chunk's keys along ``axis``, int32."""
    positions: jax.Array = start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return positions


def visible(geo: Geometry, item: Item, start: Scalar, shape: tuple[int, int], group: int) -> jax.Array:
    """Which keys each row sees, ``[rows, tokens]``: none after it, none before its window.

    Args:
        geo: the kernel's sizes.
        item: the queries.
        start: position of the chunk's first key.
        shape: (rows, tokens).
        group: rows a query; the rows of a decode item are one query.
    """
    keys = key_positions(start, shape, 1)
    query = item.position + jax.lax.broadcasted_iota(jnp.int32, shape, 0) // group
    seen: jax.Array = keys <= query
    return seen if geo.window is None else seen & (keys > query - geo.window)


def fetched(geo: Geometry, item: Item, start: Scalar, tokens: int) -> jax.Array:
    """Which tokens of a chunk some query sees, ``[tokens, D']``: the rest of VMEM holds anything, NaN too."""
    keys = key_positions(start, (tokens, geo.lanes), 0)
    inside: jax.Array = (keys >= item.low) & (keys < item.high)
    return inside


def attend_decode(geo: Geometry, pages: Ref, q: Ref, state: State, item: Item, start: Scalar, *, edge: bool) -> None:
    """One chunk of one decode row, all heads unrolled.

    The values of a head are used ``lag`` heads after its keys, so that the matrix unit works on one head's logits
    while another's are in the softmax; the compiler loads V again where registers run out rather than spill.

    Args:
        geo: the kernel's sizes.
        pages: ``[chunk pages, page_size, stride, p, 128]`` in VMEM.
        q: ``[H, rows, D']`` in VMEM.
        state: softmax state.
        item: the row.
        start: position of the chunk's first key.
        edge: whether some key of the chunk is not seen.
    """
    tokens = pages.shape[0] * geo.page_size
    keep = fetched(geo, item, start, tokens) if edge else None
    mask = visible(geo, item, start, (geo.decode_rows, tokens), geo.decode_rows) if edge else None
    pending: list[tuple[int, jax.Array, jax.Array, jax.Array]] = []
    lag = min(DECODE_LAG, geo.heads)
    for head in range(geo.heads):
        k, v = load_kv(geo, pages, head, keep)
        shrink, p = update_softmax(geo, scores(geo, q[head], k, mask), state, head)
        pending.append((head, shrink, p, v))
        if len(pending) > lag:
            done, *late = pending.pop(0)
            accumulate(geo, late[0], late[1], late[2], state, done)
    for done, *late in pending:
        accumulate(geo, late[0], late[1], late[2], state, done)


DECODE_LAG = 4


def attend_prefill(
    geo: Geometry, pages: Ref, load_q: Any, state: State, item: Item, start: Scalar, *, edge: bool
) -> None:
    """One chunk of one block of queries, a loop over the heads.

    Args:
        geo: the kernel's sizes.
        pages: ``[chunk pages, page_size, stride, p, 128]`` in VMEM.
        load_q: head to the query rows ``[rows, D']``.
        state: softmax state.
        item: the queries.
        start: position of the chunk's first key.
        edge: whether some key of the chunk is not seen by some query.
    """
    tokens = pages.shape[0] * geo.page_size

    def one_head(head: Scalar, _: None) -> None:
        keep = fetched(geo, item, start, tokens) if edge else None
        mask = visible(geo, item, start, (geo.prefill_rows, tokens), geo.group) if edge else None
        k, v = load_kv(geo, pages, head, keep)
        shrink, p = update_softmax(geo, scores(geo, load_q(head), k, mask), state, head)
        accumulate(geo, shrink, p, v, state, head)

    jax.lax.fori_loop(0, geo.heads, one_head, None)
