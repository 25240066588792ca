"""Turns scheduled rows into the parcel of a step, padded to one of a few static shapes."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from engine.batch import ParcelShape, StepParcel
from engine.memory.cache_manager import CacheManager
from engine.serving.scheduler import ScheduledStep


def token_buckets(max_running_requests: int, max_step_tokens: int) -> list[int]:
    """The token counts that steps are padded to: the decode batch, then doublings up to the budget.

    Doubling bounds the padding of a step by its own length.
    """
    buckets = [max_running_requests]
    while buckets[-1] < max_step_tokens:
        buckets.append(min(buckets[-1] * 2, max_step_tokens))
    return buckets


def parcel_shapes(rows: int, max_step_tokens: int, pages: int) -> list[ParcelShape]:
    """The static shapes of steps, the smallest first; ``pages`` is the width of the page table."""
    return [ParcelShape(tokens, rows, pages) for tokens in token_buckets(rows, max_step_tokens)]


class Batcher:
    """Fills parcels.

    Args:
        cache: where the page table is.
        shapes: as ``parcel_shapes`` makes them.
    """

    def __init__(self, cache: CacheManager, shapes: list[ParcelShape]) -> None:
        self._cache = cache
        self._shapes = shapes

    def fill(self, step: ScheduledStep) -> tuple[StepParcel, ParcelShape]:
        """Makes the parcel of a step, in the smallest shape that holds it."""
        rows, total = step.rows, len(step.out_cache_loc)
        shape = self._shapes[bisect_left([s.tokens for s in self._shapes], total)]
        parcel = StepParcel.padding(shape)
        counts = np.array([row.count for row in rows], np.int32)
        ends = np.array([row.start + row.count for row in rows], np.int32)
        batch = len(rows)
        parcel.cu_q_lens[1 : batch + 1] = np.cumsum(counts)
        parcel.cu_q_lens[batch + 1 :] = total
        parcel.token_ids[:total] = np.concatenate([row.tokens() for row in rows])
        parcel.positions[:total] = np.arange(total) + np.repeat(ends - parcel.cu_q_lens[1 : batch + 1], counts)
        parcel.out_cache_loc[:total] = step.out_cache_loc
        parcel.kv_lens[:batch] = parcel.sample_position[:batch] = ends
        parcel.page_table[:batch] = self._cache.page_table.rows(np.array([row.request.req_pool_idx for row in rows]))
        for name in ("top_k", "seed", "temperature", "top_p"):
            getattr(parcel, name)[:batch] = [getattr(row.request.params, name) for row in rows]
        return parcel, shape
