"""Narrow caches: int8 or int4 codes with one float32 scale for each token and row of K or V.

A token's codes and scales depend on that token alone, so no calibration is needed and a prefix has the same bytes
however it was computed. An int4 cache holds keys after a Hadamard rotation over head_dim, as in QuaRot (arXiv
2404.00456): it spreads channels that are much larger than others, and logits stay as they are when queries are rotated
alike. What else was tried is in docs/adr/0005.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from engine.errors import ShapeError

LARGEST = 2.0**112  # what is stored saturates here, so that sums of 2**15 elements stay finite
# Of a row's largest magnitude: below it the scale, or its reciprocal, would not be a normal number.
SMALLEST = 2.0**-119
SCALE_DTYPE = np.dtype(np.float32)


class NarrowKV(NamedTuple):
    """A layer's narrow buffer.

    The scale of row ``r`` of slot ``s`` is ``scales[s // page, r * page + s % page]``: the scales of a page are
    together, and within it those of a head, so that heads split along the last axis as they do in the codes.

    Attributes:
        codes: ``[S, 2H', W']`` int8, or uint8 with two int4 codes in a byte; stored as any fused buffer.
        scales: ``[S / page_size, 2H' * page_size]`` float32; a value is its code times its scale.
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.codes.shape[0] // self.scales.shape[0]


Buffer: TypeAlias = jax.Array | NarrowKV
AnyBuffer = TypeVar("AnyBuffer", bound=Buffer)  # of a function that returns the kind of buffer that it takes


@dataclass(frozen=True)
class NarrowKind:
    """What the codes of a narrow dtype are.

    Attributes:
        code_dtype: dtype of the elements of ``NarrowKV.codes``.
        per_element: codes in one element.
        top: the code that a row's largest magnitude becomes: 127, or its negative; or -8, of which there is no
            negative in four bits, so that the scale takes the sign of what is largest (as in llama.cpp's Q4_0).
        rotated: whether keys are stored rotated.
    """

    code_dtype: np.dtype[Any]
    per_element: int
    top: int
    rotated: bool

    @property
    def most(self) -> int:
        """The largest code."""
        return self.top if self.top > 0 else -self.top - 1


INT8 = NarrowKind(np.dtype(np.int8), per_element=1, top=127, rotated=False)
INT4 = NarrowKind(np.dtype(np.uint8), per_element=2, top=-8, rotated=True)
KINDS = {"int8": INT8, "int4": INT4}  # by the name of the pool's dtype


def kind_of(code_dtype: DTypeLike) -> NarrowKind:
    """The kind of ``NarrowKV.codes`` of a dtype; raises ShapeError where there is none."""
    for kind in KINDS.values():
        if kind.code_dtype == code_dtype:
            return kind
    raise ShapeError(f"the codes of a NarrowKV are {jnp.dtype(code_dtype)}; they must be int8, or uint8 for int4")


def row_width(head_dim: int, kind: NarrowKind | None) -> int:
    """Stored elements of a row of K or V, without padding: head_dim where ``kind`` is None.

    Raises:
        ShapeError: head_dim is not whole elements.
    """
    if kind is None:
        return head_dim
    if head_dim % kind.per_element:
        raise ShapeError(
            f"head_dim={head_dim} is odd, and int4 stores two elements of a row in a byte; use int8 or another dtype"
        )
    return head_dim // kind.per_element


def kind_in(buffer: Buffer) -> NarrowKind | None:
    """The kind of a buffer's codes; None where it has none."""
    return kind_of(buffer.codes.dtype) if isinstance(buffer, NarrowKV) else None


def codes_of(buffer: Buffer) -> jax.Array:
    """The array ``[S, rows, lanes]`` of a buffer: itself, or its codes."""
    return buffer.codes if isinstance(buffer, NarrowKV) else buffer


def is_rotated(buffer: Buffer) -> bool:
    """Whether a buffer holds rotated keys, so that queries must be rotated too."""
    kind = kind_in(buffer)
    return kind is not None and kind.rotated


def quantise(rows: jax.Array, kind: NarrowKind) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of rows, each row by itself; the native kernel gives the same bits.

    Magnitudes above 2**112, infinities included, saturate there. A row whose largest is below 2**-119 becomes zeros,
    with scale 0. A row with a NaN gets NaN for its scale, so that its own sequence shows it, and codes 0.

    Args:
        rows: ``[..., D]``, floating; keys of a rotated kind come rotated.
        kind: the kind of the codes.

    Returns:
        codes ``[..., D / per_element]`` and scales ``[...]`` float32.
    """
    values = _bounded(rows)
    high, low = jnp.max(values, axis=-1), jnp.min(values, axis=-1)
    most = jnp.maximum(high, -low)
    extreme = jnp.where(high > -low, high, low) if kind.top < 0 else most
    spoilt = jnp.any(jnp.isnan(rows), axis=-1)  # asked apart: XLA's maximum on a CPU may pass over a NaN
    alive = (most >= SMALLEST) & ~spoilt
    inverse = jnp.where(alive, kind.top / jnp.where(alive, extreme, 1.0), 0.0)
    # Multiplied by constants and reciprocals, since XLA may make that of a division.
    scales = jnp.where(alive, extreme * np.float32(1 / kind.top), jnp.where(spoilt, jnp.nan, 0.0))
    nearest = jnp.minimum(jnp.round(values * inverse[..., None]), kind.most)
    codes = jnp.where(alive[..., None], nearest, 0.0).astype(jnp.int8)
    return (_pack(codes) if kind.per_element == 2 else codes), scales.astype(SCALE_DTYPE)


def dequantise(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """``codes[..., W]`` and ``scales[...]`` as float32 ``[..., D]``; keys of a rotated kind stay rotated."""
    kind = kind_of(codes.dtype)
    return (_unpack(codes) if kind.per_element == 2 else codes).astype(jnp.float32) * scales[..., None]


def _bounded(rows: jax.Array) -> jax.Array:
    return jnp.clip(rows.astype(jnp.float32), -LARGEST, LARGEST)


def _pack(codes: jax.Array) -> jax.Array:
    """int8 codes ``[..., D]`` as bytes ``[..., D / 2]``: element j in the low half of byte j, j + D / 2 in the high."""
    low, high = jnp.split(codes.astype(jnp.uint8), 2, axis=-1)
    return (low & 0xF) | (high << 4)


def _unpack(packed: jax.Array) -> jax.Array:
    """Inverse of ``_pack``: int8 ``[..., D]``."""
    low = (packed << 4).astype(jnp.int8) >> 4  # the shift of a signed number brings the sign back
    return jnp.concatenate([low, packed.astype(jnp.int8) >> 4], axis=-1)


def rotate(x: jax.Array) -> jax.Array:
    """The orthonormal Hadamard transform over the last axis, its own inverse; float32.

    In blocks of the largest power of two that divides head_dim. By additions in a fixed order, not by a matrix product,
    whose order may depend on how many tokens there are.

    Args:
        x: ``[..., D]``; magnitudes saturate as in ``quantise``.
    """
    dim = x.shape[-1]
    block = dim & -dim
    values, half = _bounded(x), block // 2
    while half:
        pairs = values.reshape(*x.shape[:-1], -1, 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        values, half = jnp.stack([first + second, first - second], axis=-2), half // 2
    return (values * np.float32(1 / math.sqrt(block))).reshape(x.shape)


def rows_by_token(scales: jax.Array, page_size: int) -> jax.Array:
    """Scales of pages ``[..., R * page_size]`` by token: ``[..., page_size, R]``."""
    return scales.reshape(*scales.shape[:-1], -1, page_size).swapaxes(-1, -2)
