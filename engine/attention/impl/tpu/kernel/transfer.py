"""DMA between HBM and VMEM: new rows into the cache, pages out of it, queries in and results out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.attention.impl.tpu.kernel.geometry import Geometry
from engine.attention.impl.tpu.kernel.items import Item, Scalar, Schedule, page_id, page_range
from engine.attention.impl.tpu.kernel.packed_rows import Ref


def write_new_rows(geo: Geometry, schedule: Schedule, new: Ref, cache: Ref, sem: Ref) -> None:
    """Copies the new tokens' K and V into their pages, one DMA for the part of each page, and waits for all of them.

    Args:
        geo: the kernel's sizes.
        schedule: the refs of a ``Schedule``.
        new: ``[T, words, p, 128]`` in HBM.
        cache: ``[pages, page_size, words, p, 128]`` in HBM.
        sem: one DMA semaphore.
    """

    def write_sequence(seq: Scalar, written: Scalar) -> Scalar:
        start, end = schedule.cu_q_lens[seq], schedule.cu_q_lens[seq + 1]
        kv_len = schedule.kv_lens[seq]
        first = kv_len - (end - start)

        def write_page(index: Scalar, written: Scalar) -> Scalar:
            position = jnp.maximum(first, index * geo.page_size)
            token = start + position - first
            slot = schedule.slots[token]
            kept, page, offset = slot >= 0, jax.lax.div(slot, geo.page_size), jax.lax.rem(slot, geo.page_size)
            count = jnp.minimum(kv_len, (index + 1) * geo.page_size) - position
            count = jnp.minimum(count, geo.page_size - offset)  # no row leaves its page, whatever the slots are

            @pl.when(kept)
            def _() -> None:
                target = cache.at[page, pl.ds(offset, count)]
                pltpu.make_async_copy(new.at[pl.ds(token, count)], target, sem).start()

            return written + jnp.where(kept, count, 0)

        last = jnp.where(end > start, pl.cdiv(kv_len, geo.page_size), 0)
        return jax.lax.fori_loop(first // geo.page_size, last, write_page, written)

    wait_new_rows(new, jax.lax.fori_loop(0, schedule.kv_lens.shape[0], write_sequence, jnp.int32(0)), sem)


def wait_new_rows(new: Ref, count: Scalar, sem: Ref) -> None:
    """Waits until ``count`` rows have reached the cache."""

    @pl.when(count > 0)
    def _() -> None:
        rows = new.at[pl.ds(0, count)]
        pltpu.make_async_copy(rows, rows, sem).wait()


def start_block(
    geo: Geometry, schedule: Schedule, cache: Ref, buffer: Ref, sem: Ref, item: Item, block: Scalar, fetch_pages: int
) -> None:
    """Starts the DMAs of one block: one for a contiguous run, else one per page.

    Args:
        geo: the kernel's sizes.
        schedule: the refs of a ``Schedule``.
        cache: ``[pages, page_size, words, p, 128]`` in HBM.
        buffer: ``[fetch_pages, page_size, stride, p, 128]`` in VMEM.
        sem: the buffer's DMA semaphore.
        item: the item that the block is for.
        block: index of the block in the item's sequence.
        fetch_pages: pages per block.
    """
    first, last = page_range(geo, item, block, fetch_pages)
    words, size = pl.ds(0, geo.words), geo.run_pages

    def copy_page(index: Scalar, _: None) -> None:
        source = cache.at[page_id(geo, schedule, item.seq, index)]
        pltpu.make_async_copy(source, buffer.at[index - block * fetch_pages, :, words], sem).start()

    def copy_group(group: Scalar, _: None) -> None:
        index = group * size
        run = schedule.runs[item.seq * (geo.table_pages // size) + group]
        target = buffer.at[pl.ds(index - block * fetch_pages, size), :, words]

        @pl.when(run > 0)
        def copy_run() -> None:
            source = cache.at[pl.ds(page_id(geo, schedule, item.seq, index), size)]
            pltpu.make_async_copy(source, target, sem).start()

        def copy_each(_: Scalar, __: None) -> None:
            # All page ids are loaded first: a load from SMEM does not pass a DMA that was issued before it.
            pages = [page_id(geo, schedule, item.seq, index + i) for i in range(size)]
            for i, page in enumerate(pages):
                pltpu.make_async_copy(cache.at[page], target.at[i], sem).start()

        # A loop of one turn or none, because the compiler would predicate a conditional: runs would wait for it too.
        jax.lax.fori_loop(run, 1, copy_each, None)

    if size == 1:
        jax.lax.fori_loop(first, last, copy_page, None)
        return
    head = pl.cdiv(first, size)
    tail = jnp.maximum(last // size, head)
    jax.lax.fori_loop(head, tail, copy_group, None)
    # The pages before and after the whole groups, one by one.
    before, after = jnp.minimum(head * size, last) - first, jnp.maximum(last - tail * size, 0)

    def copy_loose(i: Scalar, _: None) -> None:
        copy_page(jnp.where(i < before, first, tail * size - before) + i, None)

    jax.lax.fori_loop(0, before + after, copy_loose, None)


def wait_block(geo: Geometry, buffer: Ref, sem: Ref, item: Item, block: Scalar, fetch_pages: int) -> None:
    """Waits for the pages that ``start_block`` started; a semaphore counts bytes, so one wait serves all."""
    first, last = page_range(geo, item, block, fetch_pages)

    @pl.when(last > first)
    def _() -> None:
        pages = buffer.at[pl.ds(0, last - first), :, pl.ds(0, geo.words)]
        pltpu.make_async_copy(pages, pages, sem).wait()


def start_copy(source: Ref, target: Ref, sem: Ref) -> None:
    """Starts one copy."""
    pltpu.make_async_copy(source, target, sem).start()


def wait_copy(source: Ref, target: Ref, sem: Ref) -> None:
    """Waits for one copy."""
    pltpu.make_async_copy(source, target, sem).wait()
