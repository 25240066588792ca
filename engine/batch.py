"""The parcel: everything one step tells the device, packed into one array so that it moves in one transfer."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import jax

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ParcelShape:
    """The static shape of a step.

    Attributes:
        tokens: T, new tokens, padding included.
        rows: B, sequences, padding included.
        pages: P, page-table entries a row.
    """

    tokens: int
    rows: int
    pages: int

    def of(self, name: str) -> tuple[int, ...]:
        """The shape of the parcel's field ``name``."""
        if name in ("token_ids", "positions", "out_cache_loc"):
            return (self.tokens,)
        if name == "cu_q_lens":
            return (self.rows + 1,)
        return (self.rows, self.pages) if name == "page_table" else (self.rows,)

    @property
    def packed_size(self) -> int:
        """Words (4 bytes each) of the packed parcel."""
        return sum(math.prod(self.of(field.name)) for field in fields(StepParcel))


@dataclass(frozen=True)
class StepParcel:
    """What the host decides for one step. All int32 but ``temperature`` and ``top_p``, which are float32.

    Attributes:
        token_ids: ``[T]`` new tokens of all sequences, one sequence after the other.
        positions: ``[T]`` their positions in their sequences.
        out_cache_loc: ``[T]`` the slots their keys and values go to; -1 writes nothing.
        cu_q_lens: ``[B + 1]`` running sum of new tokens per sequence, from 0.
        kv_lens: ``[B]`` cached plus new tokens; 0 in padding rows.
        page_table: ``[B, P]`` page ids.
        top_k, seed: ``[B]`` as in SamplingParams.
        sample_position: ``[B]`` position of the token to be sampled, which selects the random number.
        temperature, top_p: ``[B]`` as in SamplingParams.
    """

    token_ids: Int32
    positions: Int32
    out_cache_loc: Int32
    cu_q_lens: Int32
    kv_lens: Int32
    page_table: Int32
    top_k: Int32
    seed: Int32
    sample_position: Int32
    temperature: npt.NDArray[np.float32]
    top_p: npt.NDArray[np.float32]

    @classmethod
    def padding(cls, shape: ParcelShape) -> StepParcel:
        """A parcel of ``shape`` that holds no sequence: every slot is -1, every page the null page."""
        arrays: dict[str, Any] = {
            field.name: np.zeros(shape.of(field.name), np.float32 if field.name in FLOAT_FIELDS else np.int32)
            for field in fields(cls)
        }
        arrays["out_cache_loc"].fill(-1)
        arrays["top_p"].fill(1.0)
        return cls(**arrays)

    def pack(self) -> Int32:
        """A fresh int32 vector of all fields.

        Fresh, because the CPU backend may alias a NumPy argument: changing the page table after dispatch would
        change the step that is running.
        """
        return np.concatenate([getattr(self, field.name).view(np.int32).reshape(-1) for field in fields(self)])


FLOAT_FIELDS = ("temperature", "top_p")


def unpack(packed: jax.Array, shape: ParcelShape) -> dict[str, jax.Array]:
    """Takes a packed parcel apart on the device; ``packed`` is int32 ``[shape.packed_size]``, traced or not."""
    from jax import lax  # the host half of this module stays free of jax
    from jax import numpy as jnp

    parts: dict[str, jax.Array] = {}
    start = 0
    for field in fields(StepParcel):
        extent = shape.of(field.name)
        part = packed[start : start + math.prod(extent)].reshape(extent)
        start += math.prod(extent)
        parts[field.name] = lax.bitcast_convert_type(part, jnp.float32) if field.name in FLOAT_FIELDS else part
    return parts
