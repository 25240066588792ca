"""DMA between HBM and VMEM: pages out of the cache, queries in and results out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.attention.impl.tpu.contract.geometry import Geometry
from engine.attention.impl.tpu.contract.scratch import Ref
from engine.attention.impl.tpu.contract.step_plan import Scalar, Schedule
from engine.attention.impl.tpu.kernel.items import Item, page_id, page_range

UNROLLED_PAGES = 8  # pages that are copied at once where no runs are looked for


def group_pages(geo: Geometry) -> int:
    """Pages that one turn of the loop over pages starts to fetch."""
    return geo.run_pages if geo.run_pages > 1 else UNROLLED_PAGES


def start_block(
    geo: Geometry, schedule: Schedule, cache: Ref, buffer: Ref, sem: Ref, item: Item, block: Scalar, fetch_pages: int
) -> None:
    """Starts the DMAs of an item's block: one for a contiguous run, else one per page.

    The cache is ``[pages, page_size, words, p, 128]`` in HBM, the buffer ``[fetch_pages, page_size, stride, p, 128]``.
    """
    first, last = page_range(geo, item, block, fetch_pages)
    words, size = pl.ds(0, geo.words), group_pages(geo)

    def copy_page(index: Scalar, _: None) -> None:
        source = cache.at[page_id(geo, schedule, item.seq, index)]
        pltpu.make_async_copy(source, buffer.at[index - block * fetch_pages, :, words], sem).start()

    def copy_each(group: Scalar) -> None:
        # All page ids are loaded first: a load from SMEM does not pass a DMA that was issued before it.
        pages = [page_id(geo, schedule, item.seq, group * size + i) for i in range(size)]
        for i, page in enumerate(pages):
            target = buffer.at[group * size - block * fetch_pages + i, :, words]
            pltpu.make_async_copy(cache.at[page], target, sem).start()

    def copy_group(group: Scalar, _: None) -> None:
        if geo.run_pages == 1:
            copy_each(group)
            return
        run = schedule.runs[item.seq * (geo.table_pages // size) + group]

        @pl.when(run > 0)
        def copy_run() -> None:
            source = cache.at[pl.ds(page_id(geo, schedule, item.seq, group * size), size)]
            target = buffer.at[pl.ds(group * size - block * fetch_pages, size), :, words]
            pltpu.make_async_copy(source, target, sem).start()

        # A loop of one turn or none, because the compiler would predicate a conditional: runs would wait for it too.
        jax.lax.fori_loop(run, 1, lambda _, __: copy_each(group), None)

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
