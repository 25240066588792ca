"""What a buffer holds, for attention in XLA and for checks: unpadded, narrow codes multiplied by their scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from engine.kv.layout import to_stored, unpad_fused
from engine.kv.narrow import KINDS, Buffer, NarrowKV, dequantise, kind_in, quantise, rotate, row_width, rows_by_token


def take_slots(buffer: Buffer, slots: jax.Array, head_num: int, head_dim: int) -> jax.Array:
    """The rows of slots.

    Args:
        buffer: a layer's buffer.
        slots: ``[...]`` slots within it.
        head_num: KV heads, H.
        head_dim: elements per head, D.

    Returns:
        float32 ``[..., 2H, D]``; the keys of a rotated kind are rotated.
    """
    if not isinstance(buffer, NarrowKV):
        return unpad_fused(buffer[slots], head_num, head_dim).astype(jnp.float32)
    page_size = buffer.page_size
    by_row = buffer.scales.reshape(buffer.scales.shape[0], -1, page_size)
    scales = by_row[slots // page_size, : 2 * head_num, slots % page_size]
    width = row_width(head_dim, kind_in(buffer))
    return dequantise(unpad_fused(buffer.codes[slots], head_num, width), scales)


def take_pages(buffer: Buffer, pages: jax.Array, page_size: int, head_num: int, head_dim: int) -> jax.Array:
    """The rows of whole pages.

    Args:
        buffer: a layer's buffer.
        pages: ``[n]`` page ids; those out of range are brought into it.
        page_size: tokens per page.
        head_num: KV heads, H.
        head_dim: elements per head, D.

    Returns:
        float32 ``[n, page_size, 2H, D]``; the keys of a rotated kind are rotated.
    """
    if not isinstance(buffer, NarrowKV):
        return unpad_fused(_pages_of(buffer, pages, page_size), head_num, head_dim).astype(jnp.float32)
    width = row_width(head_dim, kind_in(buffer))
    codes = unpad_fused(_pages_of(buffer.codes, pages, page_size), head_num, width)
    scales = rows_by_token(buffer.scales.at[pages].get(mode="clip"), page_size)
    return dequantise(codes, scales[..., : 2 * head_num])


def _pages_of(stored: jax.Array, pages: jax.Array, page_size: int) -> jax.Array:
    return stored.reshape(-1, page_size, *stored.shape[1:]).at[pages].get(mode="clip")


def as_stored(k: jax.Array, v: jax.Array, *, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Keys and values ``[T, H, D]`` after their way through a pool of ``dtype``, in their own dtype."""
    kind = KINDS.get(jnp.dtype(dtype).name)
    if kind is None:
        return to_stored(k, dtype).astype(k.dtype), to_stored(v, dtype).astype(v.dtype)
    turn = rotate if kind.rotated else _unchanged
    keys, values = turn(dequantise(*quantise(turn(k), kind))), dequantise(*quantise(v, kind))
    return keys.astype(k.dtype), values.astype(v.dtype)


def _unchanged(x: jax.Array) -> jax.Array:
    return x
