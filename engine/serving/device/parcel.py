"""The parcel: everything that one step sends to the device, packed into one array so that it moves in one transfer.

Positions and slots of tokens are not in it: the device keeps the page table and works them out. Of pages and tokens it
has only those that the device does not know yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import jax

Int32 = npt.NDArray[np.int32]

NOWHERE = int(np.iinfo(np.int32).max)  # a row or place beyond every table: reads the null page, writes nothing
SHARED_PAGES = 256  # new pages that fit into a parcel in addition to those that its tokens can begin
LAST_SAMPLED = -1  # in place of a token id: the token that the row sampled last, which the device has
NOT_A_TOKEN = -2  # in place of a chosen token: the row's logits were not numbers


@dataclass(frozen=True)
class ParcelShape:
    """The static shape of a step.

    Attributes:
        tokens: T, new tokens, padding included.
        rows: B, sequences, padding included.
        updates: U, page-table entries that the device does not know yet, padding included.
    """

    tokens: int
    rows: int
    updates: int

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Start and end of each field of StepParcel in the packed parcel, in the order of the fields."""
        rows, updates = self.rows, self.updates
        sizes = (rows, rows, rows, rows, rows, rows, 1, rows + 1, self.tokens, updates, updates)
        return tuple(pairwise(accumulate(sizes, initial=0)))

    @property
    def packed_size(self) -> int:
        """Words (4 bytes each) of the packed parcel."""
        return self.bounds[-1][1]

    @property
    def sampling_size(self) -> int:
        """Words at the beginning of the packed parcel that hold all the sampler reads; ``rows`` alone decides it."""
        return self.bounds[SAMPLING_FIELDS - 1][1]


@dataclass(frozen=True)
class StepParcel:
    """What the host decides for one step: views of one vector, ``packed``.

    All fields are int32 but ``temperature`` and ``top_p``, which are float32.

    Attributes:
        kv_lens: ``[B]``, cached plus new tokens, which is also the position of the token to be sampled; 0 in padding.
        req_pool_idx: ``[B]``, page-table rows; ``NOWHERE`` in padding.
        top_k, seed, temperature, top_p: ``[B]``, as in SamplingParams.
        wants_logprobs: ``[1]``, whether any request of the step wants log-probabilities.
        cu_q_lens: ``[B + 1]``, running sum of new tokens per sequence, from 0.
        token_ids: ``[T]``, new tokens of all sequences, one sequence after the other; ``LAST_SAMPLED`` for a token that
            only the device knows.
        update_at: ``[U]``, places of the flattened page table that get a page; ``NOWHERE`` in padding.
        update_page: ``[U]``, the pages for these places.
        packed: int32 ``[packed_size]``, all of the above one after the other.
    """

    kv_lens: Int32
    req_pool_idx: Int32
    top_k: Int32
    seed: Int32
    temperature: npt.NDArray[np.float32]
    top_p: npt.NDArray[np.float32]
    wants_logprobs: Int32
    cu_q_lens: Int32
    token_ids: Int32
    update_at: Int32
    update_page: Int32
    packed: Int32

    @classmethod
    def padding(cls, shape: ParcelShape) -> StepParcel:
        """A parcel of ``shape`` that holds no sequence.

        Its memory is fresh, because the CPU backend may alias a NumPy argument: filling a vector that was sent before
        would change a step that still runs.
        """
        parcel = cls.over(np.zeros(shape.packed_size, np.int32), shape)
        parcel.req_pool_idx.fill(NOWHERE)
        parcel.update_at.fill(NOWHERE)
        parcel.top_p.fill(1.0)
        return parcel

    @classmethod
    def over(cls, packed: Int32, shape: ParcelShape) -> StepParcel:
        """The fields, as views, of packed parcels ``[..., packed_size]`` of ``shape``."""
        views: dict[str, Any] = {
            name: packed[..., start:stop] for name, (start, stop) in zip(FIELDS, shape.bounds, strict=True)
        }
        for name in FLOAT_FIELDS:
            views[name] = views[name].view(np.float32)
        return cls(**views, packed=packed)

    @classmethod
    def joined(cls, parcels: Sequence[StepParcel], shape: ParcelShape) -> StepParcel:
        """The parcels of several replicas, each of ``shape``, as one.

        Returns:
            A parcel whose ``packed`` holds the parcels one after the other. Its fields have an axis of replicas before
            their own; only ``wants_logprobs`` has none, and tells whether any replica wants log-probabilities.
        """
        every = cls.over(np.stack([parcel.packed for parcel in parcels]), shape)
        return replace(every, wants_logprobs=every.wants_logprobs.max(axis=0), packed=every.packed.reshape(-1))


FIELDS = tuple(field.name for field in fields(StepParcel))[:-1]
FLOAT_FIELDS = ("temperature", "top_p")
SAMPLING_FIELDS = 1 + FIELDS.index("wants_logprobs")


def unpack(packed: jax.Array, shape: ParcelShape) -> dict[str, jax.Array]:
    """Takes a packed parcel apart on the device.

    Args:
        packed: int32 ``[shape.packed_size]``, or its beginning ``[shape.sampling_size]``, which the sampler reads.
        shape: the parcel's static shape.

    Returns:
        The fields that are in it, by name, in their dtypes.
    """
    from jax import lax  # the batcher, which is free of jax, imports this module
    from jax import numpy as jnp

    names = FIELDS if packed.size == shape.packed_size else FIELDS[:SAMPLING_FIELDS]
    parts = {name: packed[start:stop] for name, (start, stop) in zip(names, shape.bounds, strict=False)}
    return parts | {name: lax.bitcast_convert_type(parts[name], jnp.float32) for name in FLOAT_FIELDS}
