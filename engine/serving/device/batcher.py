"""Turns scheduled rows into the parcel of a step, padded to one of a few static shapes."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from engine.serving.device.parcel import LAST_SAMPLED, NOWHERE, SHARED_PAGES, Int32, ParcelShape, StepParcel
from engine.serving.device.row_entries import chunks_of, empty_chunk
from engine.serving.plan.step import ReplicaStep, ScheduledStep

NO_CHUNK = empty_chunk()
NO_UPDATES = np.stack([np.full(SHARED_PAGES, NOWHERE, np.int32), np.zeros(SHARED_PAGES, np.int32)])


def token_buckets(max_running_requests: int, max_step_tokens: int) -> list[int]:
    """The token counts that steps are padded to: the decode batch, then doublings up to the budget.

    Doubling bounds the padding of a step by its own length.
    """
    buckets = [max_running_requests]
    while buckets[-1] < max_step_tokens:
        buckets.append(min(buckets[-1] * 2, max_step_tokens))
    return buckets


def parcel_shapes(rows: int, max_step_tokens: int, page_size: int, groups: int = 1) -> list[ParcelShape]:
    """The static shapes of steps, the smallest first; ``groups`` counts the page tables of a row."""
    # A sequence's tokens begin at most one page more than they fill. Cached prefixes add pages to these.
    return [
        ParcelShape(tokens, rows, groups * min(tokens, rows + tokens // page_size) + SHARED_PAGES)
        for tokens in token_buckets(rows, max_step_tokens)
    ]


@dataclass(frozen=True)
class Pattern:
    """The parcel of a step of which the device has every token, to be copied while the same requests decode."""

    membership: int
    shape: ParcelShape
    packed: Int32


class Batcher:
    """Fills parcels.

    Args:
        shapes: shapes of one replica's parcel, as ``parcel_shapes`` makes them.
        replicas: number of parts of a step.
    """

    def __init__(self, shapes: list[ParcelShape], replicas: int = 1) -> None:
        self._shapes = shapes
        self._tokens = [shape.tokens for shape in shapes]
        self._patterns: list[Pattern | None] = [None] * replicas

    def fill(self, step: ScheduledStep) -> tuple[StepParcel, ParcelShape, list[Int32]]:
        """Makes the parcel of a step: all replicas' parts in the shape that the largest needs, one after the other.

        Returns:
            The parcel, the shape of each replica's part of it, and the page-table updates that it has no room for,
            which must reach the device before it: int32 ``[2 * replicas, SHARED_PAGES]`` each, of every replica the
            places and then the pages.
        """
        shape = self.shape_of(max(part.num_tokens for part in step.parts))
        filled = [self._fill_part(index, part, shape) for index, part in enumerate(step.parts)]
        if len(filled) == 1:
            return filled[0][0], shape, filled[0][1]
        parcel = StepParcel.joined([parcel for parcel, _ in filled], shape)
        rounds = zip_longest(*(updates for _, updates in filled), fillvalue=NO_UPDATES)
        return parcel, shape, [np.concatenate(parts) for parts in rounds]

    def adjusts(self, step: ScheduledStep) -> Int32 | None:
        """Which rows of the step's parcel choose by adjusted logits, 1 or 0: int32 ``[replicas * B]``; None for none.

        It goes to the device apart, because few steps have such rows.
        """
        if not step.adjusts:
            return None
        rows = np.zeros((len(step.parts), self._shapes[0].rows), np.int32)
        for own, part in zip(rows, step.parts, strict=True):
            if part.adjusts is not None:
                own[: part.adjusts.size] = part.adjusts
        return rows.reshape(-1)

    def entries(self, step: ScheduledStep) -> list[Int32]:
        """What the device must know of the requests that a step has entered, before it: see ``row_entries``.

        Returns:
            int32 ``[replicas * CHUNK_WORDS]`` each, a chunk of every replica.
        """
        if not step.has_entered:
            return []
        each = [[chunk for request in part.entered for chunk in chunks_of(request)] for part in step.parts]
        return [np.concatenate(chunks) for chunks in zip_longest(*each, fillvalue=NO_CHUNK)]

    def shape_of(self, tokens: int) -> ParcelShape:
        """The smallest shape that holds as many new tokens."""
        return self._shapes[bisect_left(self._tokens, tokens)]

    def _fill_part(self, index: int, part: ReplicaStep, shape: ParcelShape) -> tuple[StepParcel, list[Int32]]:
        batch, pattern = len(part.requests), self._patterns[index]
        if part.repeats and pattern and pattern.membership == part.membership and pattern.shape == shape:
            parcel = StepParcel.over(pattern.packed.copy(), shape)
            np.add(part.starts, 1, out=parcel.kv_lens[:batch], casting="same_kind")
            return parcel, _fill_updates(parcel, *part.new_pages)
        parcel = StepParcel.padding(shape)
        np.cumsum(part.counts, out=parcel.cu_q_lens[1 : batch + 1])
        parcel.cu_q_lens[batch + 1 :] = part.num_tokens
        np.add(part.starts, part.counts, out=parcel.kv_lens[:batch], casting="same_kind")
        parcel.req_pool_idx[:batch] = part.req_pool_idx
        _fill_tokens(parcel, part)
        sampling = part.sampling
        parcel.top_k[:batch], parcel.seed[:batch] = sampling.top_k, sampling.seed
        parcel.temperature[:batch], parcel.top_p[:batch] = sampling.temperature, sampling.top_p
        parcel.wants_logprobs[0] = sampling.wants_logprobs.any()
        self._patterns[index] = None
        if part.membership is not None and part.on_device.all():
            self._patterns[index] = Pattern(part.membership, shape, parcel.packed.copy())
        return parcel, _fill_updates(parcel, *part.new_pages)


def _fill_tokens(parcel: StepParcel, part: ReplicaStep) -> None:
    parcel.token_ids[: part.num_tokens] = LAST_SAMPLED
    for index in (~part.on_device).nonzero()[0].tolist():
        start, count = int(part.starts[index]), int(part.counts[index])
        first = int(parcel.cu_q_lens[index])
        parcel.token_ids[first : first + count] = part.requests[index].tokens(start, start + count)


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
