"""Exactly the bytes that must move, counted from the DMAs that the interpreter starts, by nothing in the kernel."""

from __future__ import annotations

import collections
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as mosaic_interpret
from tpu_cases import SMALL, Step, make_step, run

from engine.attention.impl.tpu.kernel import transfer
from engine.kv.tpu_view import view_words

MIXED = [(1, 5), (0, 40), (1, 300), (40, 170), (3, 3), (1, 129), (1, 512)]


class Traffic:
    """Pages that leave the cache and rows that enter it."""

    def __init__(self, cache_shape: tuple[int, ...]) -> None:
        self.cache_shape = cache_shape
        self.pages_read: collections.Counter[int] = collections.Counter()
        self.elements_read = self.elements_written = self.reads = 0

    def note(self, source: Any, target: Any) -> None:
        """Takes the transforms of one DMA's two sides; the cache is the array of the cache's shape."""
        if source and source[0].shape == self.cache_shape:
            pages, self.reads = source[0].indices[0], self.reads + 1
            first, count = (pages.start, pages.size) if hasattr(pages, "start") else (pages, 1)
            self.pages_read.update(range(int(first), int(first) + int(count)))
            self.elements_read += _elements(source[0])
        if target and target[0].shape == self.cache_shape:
            self.elements_written += _elements(target[0])


def _elements(indexer: Any) -> int:
    return math.prod(int(index.size) for index in indexer.indices if hasattr(index, "stride"))


def traffic_of(step: Step, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Traffic:
    words = view_words(jnp.asarray(step.fused[:1])).shape
    traffic = Traffic((step.fused.shape[0] // step.page_size, step.page_size, *words[1:]))
    plain = mosaic_interpret.dma_start

    def counted(*args: Any, **kwargs: Any) -> Any:
        traffic.note(args[5], args[8])
        return plain(*args, **kwargs)

    monkeypatch.setattr(mosaic_interpret, "dma_start", counted)
    run(step, **options)
    return traffic


def pages_that_must_be_read(step: Step, window: int | None) -> collections.Counter[int]:
    """Each page that some query of a block sees, once a block of queries."""
    needed: collections.Counter[int] = collections.Counter()
    for row, kv_len in enumerate(step.kv_lens):
        q_len = int(step.cu_q_lens[row + 1] - step.cu_q_lens[row])
        for first in range(0, q_len, SMALL.prefill_queries):
            queries = min(SMALL.prefill_queries, q_len - first)
            position = int(kv_len) - q_len + first
            low = 0 if window is None else max(0, position - window + 1)
            columns = range(low // step.page_size, -(-(position + queries) // step.page_size))
            needed.update(int(step.page_table[row, column]) for column in columns)
    return needed


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("contiguous", [False, True])
def test_each_page_is_read_once_a_block_of_queries_and_each_new_row_written_once(
    window: int | None, contiguous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(20, MIXED, contiguous=contiguous)
    traffic = traffic_of(step, monkeypatch, sliding_window=window)
    needed = pages_that_must_be_read(step, window)
    row = int(np.prod(step.fused.shape[1:]))
    assert traffic.pages_read == needed
    assert traffic.elements_read == needed.total() * step.page_size * row
    assert traffic.elements_written == int(step.cu_q_lens[-1]) * row
    # Runs of pages that lie together go in one DMA; this window is shorter than a run.
    if contiguous and window is None:
        assert traffic.reads < 2 / 3 * needed.total()
    else:
        assert traffic.reads == needed.total()


def test_the_count_notices_a_page_that_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(21, [(1, 40)])
    monkeypatch.setattr(transfer, "page_id", lambda geo, schedule, seq, index: schedule.table[0])
    assert traffic_of(step, monkeypatch).pages_read != pages_that_must_be_read(step, None)
