"""Turns scheduled rows into the parcel of a step, padded to one of a few static shapes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from engine.memory.rows import ReqToTokenPool
from engine.serving.device.parcel import LAST_SAMPLED, NOWHERE, SHARED_PAGES, Int32, ParcelShape, StepParcel
from engine.serving.plan.step import ScheduledStep

NO_UPDATES = np.stack([np.full(SHARED_PAGES, NOWHERE, np.int32), np.zeros(SHARED_PAGES, np.int32)])


def token_buckets(max_running_requests: int, max_step_tokens: int) -> list[int]:
    """The token counts that steps are padded to: the decode batch, then doublings up to the budget.

    Doubling bounds the padding of a step by its own length.
    """
    buckets = [max_running_requests]
    while buckets[-1] < max_step_tokens:
        buckets.append(min(buckets[-1] * 2, max_step_tokens))
    return buckets


def parcel_shapes(rows: int, max_step_tokens: int, page_size: int) -> list[ParcelShape]:
    """The static shapes of steps, the smallest first."""
    # A sequence's tokens begin at most one page more than they fill. Cached prefixes bring pages with them beside.
    return [
        ParcelShape(tokens, rows, min(tokens, rows + tokens // page_size) + SHARED_PAGES)
        for tokens in token_buckets(rows, max_step_tokens)
    ]


class Batcher:
    """Fills parcels.

    Args:
        page_table: whose new pages the device is told of.
        shapes: as ``parcel_shapes`` makes them.
    """

    def __init__(self, page_table: ReqToTokenPool, shapes: list[ParcelShape]) -> None:
        self._page_table = page_table
        self._shapes = shapes
        self._tokens = [shape.tokens for shape in shapes]
        rows = page_table.max_requests
        # What does not change while a request has its row, by row.
        self._noted = np.full(rows, -1, np.int64)
        self._top_k, self._seed = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self._temperature, self._top_p = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        self._wants_logprobs = np.zeros(rows, np.bool_)
        self._params: dict[str, Any] = {}  # of the rows of the last step
        self._last_rows: Int32 | None = None
        self._pattern: tuple[ParcelShape, Int32] | None = None  # the last parcel, if no token had to be sent in it

    def fill(
        self, step: ScheduledStep, shape: ParcelShape | None = None
    ) -> tuple[StepParcel, ParcelShape, list[Int32]]:
        """Makes the parcel of a step.

        Args:
            step: who feeds what.
            shape: to pad it to; None is the smallest that holds it.

        Returns:
            The parcel, its shape, and the page-table updates that it has no room for, which must reach the device
            before it: int32 ``[2, SHARED_PAGES]`` each, places and pages.
        """
        rows, batch, total = step.req_pool_idx, len(step.requests), step.num_tokens
        new_pages = self._page_table.take_new_pages(rows) if step.growth is None else step.growth.take_new_pages()
        if step.growth is not None and self._pattern is not None and rows is self._last_rows:
            shape, pattern = self._pattern
            parcel = StepParcel.over(pattern.copy(), shape)
            np.add(step.starts, 1, out=parcel.kv_lens[:batch], casting="same_kind")
            return parcel, shape, self._fill_updates(parcel, *new_pages)
        shape = shape or self.shape_of(total)
        parcel = StepParcel.padding(shape)
        np.cumsum(step.counts, out=parcel.cu_q_lens[1 : batch + 1])
        parcel.cu_q_lens[batch + 1 :] = total
        np.add(step.starts, step.counts, out=parcel.kv_lens[:batch], casting="same_kind")
        parcel.req_pool_idx[:batch] = rows
        self._fill_tokens(parcel, step, total)
        if rows is not self._last_rows:  # while nobody comes or goes, decoding rows are the same array
            self._note_params(step)
            named = {"top_k": self._top_k, "seed": self._seed, "temperature": self._temperature, "top_p": self._top_p}
            self._params = {name: values[rows] for name, values in named.items()}
            self._params["wants_logprobs"] = self._wants_logprobs[rows].any()
            self._last_rows = rows
        for name, values in self._params.items():
            getattr(parcel, name)[:batch] = values
        self._pattern = (shape, parcel.packed.copy()) if step.on_device.all() else None
        return parcel, shape, self._fill_updates(parcel, *new_pages)

    def shape_of(self, tokens: int) -> ParcelShape:
        """The smallest shape that holds as many new tokens."""
        return self._shapes[bisect_left(self._tokens, tokens)]

    @staticmethod
    def _fill_tokens(parcel: StepParcel, step: ScheduledStep, total: int) -> None:
        parcel.token_ids[:total] = LAST_SAMPLED
        for index in np.flatnonzero(~step.on_device).tolist():
            start, count = int(step.starts[index]), int(step.counts[index])
            first = int(parcel.cu_q_lens[index])
            parcel.token_ids[first : first + count] = step.requests[index].tokens(start, start + count)

    def _note_params(self, step: ScheduledStep) -> None:
        """Reads the sampling parameters of requests that are new to their rows."""
        for index in np.flatnonzero(self._noted[step.req_pool_idx] != step.tenancies).tolist():
            row, request = step.req_pool_idx[index], step.requests[index]
            params = request.params
            self._noted[row] = step.tenancies[index]
            self._top_k[row], self._seed[row] = params.top_k, request.seed
            self._temperature[row], self._top_p[row] = params.temperature, params.top_p
            self._wants_logprobs[row] = params.logprobs is not None

    @staticmethod
    def _fill_updates(parcel: StepParcel, places: Int32, pages: Int32) -> list[Int32]:
        room = parcel.update_at.size
        parcel.update_at[: places.size] = places[:room]
        parcel.update_page[: places.size] = pages[:room]
        earlier = []
        for start in range(room, places.size, SHARED_PAGES):
            part = slice(start, start + SHARED_PAGES)
            updates = NO_UPDATES.copy()
            updates[0, : places[part].size], updates[1, : places[part].size] = places[part], pages[part]
            earlier.append(updates)
        return earlier


class ReplicaBatcher:
    """Fills the parcels of several replicas as one: all in the shape that the largest needs.

    Args:
        page_tables: one a replica.
        shapes: of one replica's parcel, as ``parcel_shapes`` makes them.
    """

    def __init__(self, page_tables: Sequence[ReqToTokenPool], shapes: list[ParcelShape]) -> None:
        self._batchers = [Batcher(page_table, shapes) for page_table in page_tables]

    def fill(self, step: ScheduledStep) -> tuple[StepParcel, ParcelShape, list[Int32]]:
        """As ``Batcher.fill`` for each of ``step.parts``, one after the other; a replica without work sends padding.

        Returns:
            The parcel, the shape of each replica's part of it, and the page-table updates that must come before it:
            int32 ``[2 * replicas, SHARED_PAGES]`` each.
        """
        shape = self._batchers[0].shape_of(max(part.num_tokens for part in step.parts))
        filled = [batcher.fill(part, shape) for batcher, part in zip(self._batchers, step.parts, strict=True)]
        parcel = StepParcel.joined([parcel for parcel, _, _ in filled], shape)
        rounds = zip_longest(*(updates for _, _, updates in filled), fillvalue=NO_UPDATES)
        return parcel, shape, [np.concatenate(parts) for parts in rounds]
