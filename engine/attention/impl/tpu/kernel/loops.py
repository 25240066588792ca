"""The loops of the kernel: items of one kind, blocks of an item, chunks of a block.

While one block is computed the next is fetched into the other of two buffers, even if it belongs to the next item.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from engine.attention.impl.tpu.contract.geometry import Geometry, Tile
from engine.attention.impl.tpu.contract.scratch import Operands, Ref, Scratch, Semaphores
from engine.attention.impl.tpu.contract.step_plan import Scalar, Schedule
from engine.attention.impl.tpu.kernel import flash, query_rows, transfer
from engine.attention.impl.tpu.kernel.items import Item, block_range, make_item


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

    def first_block(self, item: Item) -> Scalar:
        """The first block of an item."""
        return block_range(self.geo, item, self.tile.fetch_pages)[0]

    def q_copy(self, item: Item, buffer: Scalar) -> tuple[Ref, Ref]:
        """Source and target of the queries' DMA."""
        queries, words = pl.ds(0, item.queries), pl.ds(0, self.geo.q_words)
        return self.ops.q.at[pl.ds(item.token, item.queries)], self.scratch.q.at[buffer, queries, words]

    def out_copies(self, item: Item, buffer: Scalar) -> list[tuple[Ref, Ref]]:
        """Sources and targets of the results' DMAs."""
        words, pack = pl.ds(0, self.geo.q_words), self.geo.io_pack
        out = self.scratch.out.at[buffer, pl.ds(0, item.queries), words]
        copies = [(out, self.ops.out.at[pl.ds(item.token, item.queries)])]
        if self.ops.lse is not None:
            lse = self.scratch.lse.at[buffer, :, :, pl.ds(0, item.queries * pack)]
            copies.append((lse, self.ops.lse.at[:, :, pl.ds(item.token * pack, item.queries * pack)]))
        return copies


def run_lanes(geo: Geometry, schedule: Schedule, ops: Operands, scratch: Scratch, sems: Semaphores) -> None:
    """Walks all items of the step, one kind after the other."""
    first = jnp.int32(0)
    for kind, tile in enumerate(geo.tiles):
        lane = Lane(geo, tile, schedule, ops, scratch, sems, first, schedule.at(geo, "counts", kind))
        run_lane(lane)
        first += lane.count


def run_lane(lane: Lane) -> None:
    """Walks all items of one kind; the two buffers alternate across blocks and items."""
    sems, scratch, fetch_pages = lane.sems, lane.scratch, lane.tile.fetch_pages

    def start_block(item: Item, block: Scalar, slot: Scalar) -> None:
        pages, sem = scratch.pages.at[slot], sems.pages.at[slot]
        transfer.start_block(lane.geo, lane.schedule, lane.ops.cache, pages, sem, item, block, fetch_pages)

    def run_item(index: Scalar, slot: Scalar) -> Scalar:
        item, buffer, more = lane.item(index), index % 2, index + 1 < lane.count
        following = lane.item(jnp.minimum(index + 1, lane.count - 1))
        first, last = block_range(lane.geo, item, fetch_pages)

        @pl.when(more)
        def _() -> None:
            transfer.start_copy(*lane.q_copy(following, 1 - buffer), sems.q.at[1 - buffer])

        transfer.wait_copy(*lane.q_copy(item, buffer), sems.q.at[buffer])
        query_rows.scale_queries(lane.geo, scratch.q.at[buffer], lane.tile)
        flash.reset(lane.geo, lane.tile, scratch.state, lane.ops.sinks)

        def run_block(block: Scalar, slot: Scalar) -> Scalar:
            stays = block + 1 < last
            ahead = Item(*(jnp.where(stays, here, there) for here, there in zip(item, following, strict=True)))

            @pl.when(stays | more)
            def _() -> None:
                start_block(ahead, jnp.where(stays, block + 1, lane.first_block(following)), 1 - slot)

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
        start_block(item, lane.first_block(item), 0)
        transfer.start_copy(*lane.q_copy(item, 0), sems.q.at[0])
        jax.lax.fori_loop(0, lane.count, run_item, 0)
        left = jnp.maximum(lane.count - 2, 0)
        jax.lax.fori_loop(left, lane.count, lambda index, _: _wait_results(lane, index), None)


def _attend_block(lane: Lane, item: Item, block: Scalar, slot: Scalar, buffer: Scalar) -> None:
    """Computes a fetched block: what every query sees whole, unmasked, in chunks and then in steps; then the edges."""
    geo, tile = lane.geo, lane.tile
    step, ratio = tile.edge_pages * geo.page_size, tile.chunk_pages // tile.edge_pages
    base = block * tile.fetch_pages * geo.page_size
    end = jnp.minimum(item.high - base, tile.fetch_pages * geo.page_size)
    first, last = jnp.maximum(item.low - base, 0) // step, pl.cdiv(end, step)
    # Seen whole by every query: not after the first one, and not before the window of the last.
    whole_low = item.low * 0 if geo.window is None else item.position + item.queries - geo.window
    whole_first = jnp.clip(pl.cdiv(jnp.maximum(whole_low - base, 0), step), first, last)
    whole_last = jnp.clip((item.position + 1 - base) // step, whole_first, last)
    chunk_first = pl.cdiv(whole_first, ratio)
    chunk_last = jnp.maximum(whole_last // ratio, chunk_first)

    def attend(index: Scalar, pages: int, masked: bool) -> None:
        part = lane.scratch.pages.at[slot, pl.ds(index * pages, pages)]
        start = base + index * pages * geo.page_size
        flash.attend(geo, tile, part, lane.scratch.q.at[buffer], lane.scratch.state, item, start, edge=masked)

    def around(low: Scalar, high: Scalar, hole: tuple[Scalar, Scalar], masked: bool) -> None:
        """Steps from ``low`` to ``high`` without those in the hole, which is empty or within."""
        skipped = hole[1] - hole[0]

        def one(index: Scalar, _: None) -> None:
            attend(jnp.where(index < hole[0], index, index + skipped), tile.edge_pages, masked)

        jax.lax.fori_loop(low, high - skipped, one, None)

    jax.lax.fori_loop(chunk_first, chunk_last, lambda index, _: attend(index, tile.chunk_pages, masked=False), None)
    if ratio > 1:
        around(whole_first, whole_last, (chunk_first * ratio, chunk_last * ratio), masked=False)
    around(first, last, (whole_first, whole_last), masked=True)


def _finish(lane: Lane, item: Item, buffer: Scalar) -> None:
    """Starts the copies of an item's results to HBM."""
    geo, tile, out = lane.geo, lane.tile, lane.scratch.out.at[buffer]

    def result(head: Scalar) -> jax.Array:
        rows, lse = flash.result(lane.scratch.state, head, tile.rows)
        if geo.has_lse:
            query_rows.store_lse(geo, lane.scratch.lse.at[buffer, head], tile, lse)
        return rows

    if tile.queries == 1:
        query_rows.store_token(geo, out, [result(head)[: geo.group] for head in range(geo.heads)])
    else:
        jax.lax.fori_loop(0, geo.heads, lambda head, _: query_rows.store_rows(geo, out, head, tile, result(head)), None)
    for source, target in lane.out_copies(item, buffer):
        transfer.start_copy(source, target, lane.sems.out.at[buffer])


def _wait_results(lane: Lane, index: Scalar) -> None:
    for source, target in lane.out_copies(lane.item(index), index % 2):
        transfer.wait_copy(source, target, lane.sems.out.at[index % 2])
