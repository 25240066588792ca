"""What the kernel does before attention: new K and V go to their pages, and results of dead tokens become zero.

Where K and V arrive apart, they stream through VMEM in groups of tokens: while one is merged, others arrive and leave.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.attention.impl.tpu.contract.geometry import Geometry
from engine.attention.impl.tpu.contract.scratch import Fresh, Operands, Ref
from engine.attention.impl.tpu.contract.step_plan import Scalar, Schedule
from engine.attention.impl.tpu.kernel import packed_rows, query_rows
from engine.attention.impl.tpu.kernel.items import page_id


def write(geo: Geometry, schedule: Schedule, ops: Operands, fresh: Fresh, zeros: Ref, sem: Ref) -> None:
    """Writes the new rows into their pages and zeros for tokens of no sequence, and waits for both.

    New are the merged rows ``[T, words, p, 128]``, or K and V apart, each ``[T * H / p, p, 128]`` in row order; the
    scratch is that of ``fresh_shapes``.
    """
    dead = _zero_dead_tokens(geo, schedule, zeros, ops.out, sem)
    _write_new_rows(geo, schedule, ops.new, ops.cache, fresh)
    wait_rows(ops.out, dead, sem)


def _write_new_rows(geo: Geometry, schedule: Schedule, new: tuple[Ref, ...], cache: Ref, fresh: Fresh) -> None:
    raw, merged, arrived, sem = fresh
    begin, end = (jnp.int32(0), schedule.at(geo, "cu_q_lens", 0)), schedule.at(geo, "cu_q_lens", geo.plan_rows)
    if not geo.fresh_tokens:
        *_, count = _start_rows(geo, schedule, new[0], cache, sem.at[0], 0, begin, end)
        wait_rows(new[0], count, sem.at[0])
        return
    step, tokens = geo.fresh_tokens, new[0].shape[0] * geo.pack // geo.heads
    groups = jnp.maximum(pl.cdiv(end, step), 1)

    def arrivals(group: Scalar) -> list[Any]:
        count = jnp.minimum(tokens - group * step, step) * geo.heads // geo.pack
        source, slot = pl.ds(group * (step * geo.heads // geo.pack), count), group % 2
        targets = [raw.at[slot, half, pl.ds(0, count)] for half in (0, 1)]
        return [pltpu.make_async_copy(new[i].at[source], targets[i], arrived.at[slot]) for i in (0, 1)]

    def run_group(group: Scalar, carry: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
        seq, token, last, before = carry
        slot = group % 2

        @pl.when(group + 1 < groups)
        def _() -> None:
            for copy in arrivals(group + 1):
                copy.start()

        for copy in arrivals(group):
            copy.wait()
        wait_rows(merged.at[slot], before, sem.at[slot])
        packed_rows.merge_kv_words(geo, raw.at[slot, 0], raw.at[slot, 1], merged.at[slot], step)
        seq, token, count = _start_rows(
            geo, schedule, merged.at[slot], cache, sem.at[slot], group * step, (seq, token),
            jnp.minimum((group + 1) * step, end),
        )  # fmt: skip
        return seq, token, count, last

    for copy in arrivals(jnp.int32(0)):
        copy.start()
    *_, last, before = jax.lax.fori_loop(0, groups, run_group, (*begin, jnp.int32(0), jnp.int32(0)))
    for count, slot in ((before, groups % 2), (last, (groups - 1) % 2)):
        wait_rows(merged.at[slot], count, sem.at[slot])


def _start_rows(
    geo: Geometry, schedule: Schedule, rows: Ref, cache: Ref, sem: Ref, base: Scalar, at: Any, end: Scalar
) -> tuple[Scalar, Scalar, Scalar]:
    """Copies tokens from ``at`` to ``end``, one copy for each page's part; ``rows`` begin with token ``base``.

    Returns the sequence and token where the next call goes on, and the number of rows that are on their way.
    """

    def start_part(carry: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
        seq, token, started = carry
        stop = schedule.at(geo, "cu_q_lens", seq + 1)
        position = schedule.at(geo, "kv_lens", seq) - (stop - token)
        page, offset = _locate(geo, schedule, seq, token, position)
        # No part leaves its page, whatever the slots are.
        room = geo.page_size - jnp.maximum(jax.lax.rem(jnp.maximum(position, 0), geo.page_size), offset)
        count = jnp.minimum(jnp.minimum(stop, end) - token, jnp.where(position < 0, -position, room))
        kept = (page >= 0) & (position >= 0) & (count > 0)

        @pl.when(kept)
        def _() -> None:
            target = cache.at[page, pl.ds(offset, count)]
            pltpu.make_async_copy(rows.at[pl.ds(token - base, count)], target, sem).start()

        token += count
        return seq + (token >= stop), token, started + jnp.where(kept, count, 0)

    return jax.lax.while_loop(lambda carry: carry[1] < end, start_part, (*at, jnp.int32(0)))


def _locate(geo: Geometry, schedule: Schedule, seq: Scalar, token: Scalar, position: Scalar) -> tuple[Scalar, Scalar]:
    """Page of a new token and its place there; a negative page where it is not written."""
    if schedule.slots.shape[0] == 1:
        place = jnp.maximum(position, 0)
        return page_id(geo, schedule, seq, jax.lax.div(place, geo.page_size)), jax.lax.rem(place, geo.page_size)
    slot = schedule.slots[jnp.minimum(token, schedule.slots.shape[0] - 1)]
    page = jnp.where(slot < 0, -1, jax.lax.div(slot, geo.page_size))
    return page, jax.lax.rem(jnp.maximum(slot, 0), geo.page_size)


def wait_rows(rows: Ref, count: Scalar, sem: Ref) -> None:
    """Waits until the copies of ``count`` rows, each as large as one of ``rows``, have arrived."""

    @pl.when(count > 0)
    def _() -> None:
        some = rows.at[pl.ds(0, count)]
        pltpu.make_async_copy(some, some, sem).wait()


def _zero_dead_tokens(geo: Geometry, schedule: Schedule, zeros: Ref, out: Ref, sem: Ref) -> Scalar:
    """Starts the copies of zeros, and returns for how many tokens."""
    most = zeros.shape[0]
    query_rows.store_zeros(geo, zeros, most)

    def zero(first: Scalar, count: Scalar) -> None:
        def start(index: Scalar, _: None) -> None:
            part = jnp.minimum(count - index * most, most)
            source = zeros.at[pl.ds(0, part), pl.ds(0, geo.q_words)]
            pltpu.make_async_copy(source, out.at[pl.ds(first + index * most, part)], sem).start()

        jax.lax.fori_loop(0, pl.cdiv(count, most), start, None)

    before, end = schedule.at(geo, "cu_q_lens", 0), schedule.at(geo, "cu_q_lens", geo.plan_rows)
    zero(0, before)
    zero(end, out.shape[0] - end)
    return before + out.shape[0] - end
