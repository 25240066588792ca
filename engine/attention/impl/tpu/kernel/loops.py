"""The loops of the kernel: items of one kind, blocks of an item, chunks of a block.

Pages stream from HBM through two buffers: while one block is computed the next is fetched, even if it belongs to the
next item.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from engine.attention.impl.tpu.kernel import flash, packed_rows, transfer
from engine.attention.impl.tpu.kernel.geometry import Geometry, Tile
from engine.attention.impl.tpu.kernel.items import Item, Scalar, Schedule, block_range, make_item
from engine.attention.impl.tpu.kernel.packed_rows import Ref


class Operands(NamedTuple):
    """References to HBM, and for the sinks to VMEM; all as in ``call_kernel``."""

    q: Ref
    new: Ref
    sinks: Ref | None
    out: Ref
    lse: Ref | None
    cache: Ref


class Scratch(NamedTuple):
    """VMEM: two buffers of each, and one softmax state; each kind of item uses a part of it.

    Attributes:
        pages: ``[2, fetch_pages, page_size, stride, p, 128]``.
        q: ``[2, H, queries, G / p, p, D']``.
        out: as ``q``.
        lse: ``[2, H, queries, G, 1, 128]``; a placeholder where no log-sum-exp is wanted.
        state: softmax state.
    """

    pages: Any
    q: Any
    out: Any
    lse: Any
    state: flash.State


class Semaphores(NamedTuple):
    """DMA semaphores: one for each buffer, and one for the new rows."""

    pages: Any
    q: Any
    out: Any
    write: Any


class Lane(NamedTuple):
    """What the walk over the items of one kind works with: the ``count`` items from ``first`` on."""

    geo: Geometry
    tile: Tile
    schedule: Schedule
    ops: Operands
    scratch: Scratch
    sems: Semaphores
    first: Scalar
    count: Scalar

    def item(self, index: Scalar) -> Item:
        """The ``index``-th item of this kind."""
        return make_item(self.geo, self.schedule, self.first + index, self.tile.queries)

    def q_copy(self, item: Item, buffer: Scalar) -> tuple[Ref, Ref]:
        """Source and target of the queries' DMA."""
        source = self.ops.q.at[:, pl.ds(item.token, item.queries)]
        return source, self.scratch.q.at[buffer, :, pl.ds(0, item.queries)]

    def out_copies(self, item: Item, buffer: Scalar) -> list[tuple[Ref, Ref]]:
        """Sources and targets of the results' DMAs."""
        pairs = [(self.scratch.out, self.ops.out), (self.scratch.lse, self.ops.lse)]
        return [
            (source.at[buffer, :, pl.ds(0, item.queries)], target.at[:, pl.ds(item.token, item.queries)])
            for source, target in pairs
            if target is not None
        ]


def run_lane(lane: Lane) -> None:
    """Walks all items of one kind; the two buffers alternate across blocks and items."""
    sems, scratch, fetch_pages = lane.sems, lane.scratch, lane.tile.fetch_pages

    def start_block(item: Item, block: Scalar, slot: Scalar) -> None:
        pages, sem = scratch.pages.at[slot], sems.pages.at[slot]
        transfer.start_block(lane.geo, lane.schedule, lane.ops.cache, pages, sem, item, block, fetch_pages)

    def first_block(item: Item) -> Scalar:
        return block_range(lane.geo, item, fetch_pages)[0]

    def run_item(index: Scalar, slot: Scalar) -> Scalar:
        item, buffer, more = lane.item(index), index % 2, index + 1 < lane.count
        following = lane.item(jnp.minimum(index + 1, lane.count - 1))
        first, last = block_range(lane.geo, item, fetch_pages)

        @pl.when(more)
        def _() -> None:
            transfer.start_copy(*lane.q_copy(following, 1 - buffer), sems.q.at[1 - buffer])

        transfer.wait_copy(*lane.q_copy(item, buffer), sems.q.at[buffer])
        flash.reset(scratch.state, lane.tile.rows, lane.ops.sinks)

        def run_block(block: Scalar, slot: Scalar) -> Scalar:
            stays = block + 1 < last
            ahead = Item(*(jnp.where(stays, here, there) for here, there in zip(item, following, strict=True)))

            @pl.when(stays | more)
            def _() -> None:
                start_block(ahead, jnp.where(stays, block + 1, first_block(following)), 1 - slot)

            transfer.wait_block(lane.geo, scratch.pages.at[slot], sems.pages.at[slot], item, block, fetch_pages)
            _attend_block(lane, item, block, slot, buffer)
            return 1 - slot

        slot = jax.lax.fori_loop(first, last, run_block, slot)

        @pl.when(index >= 2)
        def _() -> None:
            _wait_results(lane, index - 2)

        _finish(lane, item, buffer)
        return slot

    @pl.when(lane.count > 0)
    def _() -> None:
        item = lane.item(0)
        start_block(item, first_block(item), 0)
        transfer.start_copy(*lane.q_copy(item, 0), sems.q.at[0])
        jax.lax.fori_loop(0, lane.count, run_item, 0)
        left = jnp.maximum(lane.count - 2, 0)
        jax.lax.fori_loop(left, lane.count, lambda index, _: _wait_results(lane, index), None)


def _attend_block(lane: Lane, item: Item, block: Scalar, slot: Scalar, buffer: Scalar) -> None:
    """Computes the chunks of a fetched block: first those that every query sees whole, unmasked, then the edges."""
    geo, tile = lane.geo, lane.tile
    chunk = tile.chunk_pages * geo.page_size
    base = block * tile.fetch_pages * geo.page_size
    end = jnp.minimum(item.high, base + tile.fetch_pages * geo.page_size)
    first, last = jnp.maximum(item.low - base, 0) // chunk, pl.cdiv(end - base, chunk)
    # Seen whole by every query: not after the first one, and not before the window of the last.
    whole_low = item.low * 0 if geo.window is None else item.position + item.queries - geo.window
    whole_first = jnp.clip(pl.cdiv(jnp.maximum(whole_low - base, 0), chunk), first, last)
    whole_last = jnp.clip((item.position + 1 - base) // chunk, whole_first, last)

    def attend(index: Scalar, edge: bool) -> None:
        pages = lane.scratch.pages.at[slot, pl.ds(index * tile.chunk_pages, tile.chunk_pages)]
        flash.attend(
            geo, tile, pages, lane.scratch.q.at[buffer], lane.scratch.state, item, base + index * chunk, edge=edge
        )

    jax.lax.fori_loop(whole_first, whole_last, lambda index, _: attend(index, edge=False), None)

    def attend_edge(index: Scalar, _: None) -> None:
        attend(jnp.where(index < whole_first, index, index + whole_last - whole_first), edge=True)

    jax.lax.fori_loop(first, last - (whole_last - whole_first), attend_edge, None)


def _finish(lane: Lane, item: Item, buffer: Scalar) -> None:
    """Starts the copies of an item's results to HBM."""
    scratch = lane.scratch

    def one_head(head: Scalar, _: None) -> None:
        rows, lse = flash.result(scratch.state, head, lane.tile.rows)
        packed_rows.store_rows(lane.geo, scratch.out.at[buffer, head], rows)
        if lane.geo.has_lse:
            packed_rows.store_rows(lane.geo, scratch.lse.at[buffer, head], lse)

    jax.lax.fori_loop(0, lane.geo.heads, one_head, None)
    for source, target in lane.out_copies(item, buffer):
        transfer.start_copy(source, target, lane.sems.out.at[buffer])


def _wait_results(lane: Lane, index: Scalar) -> None:
    for source, target in lane.out_copies(lane.item(index), index % 2):
        transfer.wait_copy(source, target, lane.sems.out.at[index % 2])
