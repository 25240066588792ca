"""The seam between VMEM and registers: the one place where a kernel knows how rows are packed in words.

The layout law is that of ``engine/kv/layout.py``: row 2h is K_h and row 2h + 1 is V_h. On TPU p consecutive rows share
a 32-bit word (bf16: K_h low, V_h high), so one strided load of every token's word h brings both, and a shift and a
truncation part them. The interpreter has no ref bitcast or reshape; there the same values are taken by plain indexing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.attention.tpu.geometry import LANES, Geometry

Ref = Any  # a Pallas memory reference; jax has no public type for it

_UINT = {1: jnp.uint32, 2: jnp.uint16, 4: jnp.uint8}


def _rows(ref: Ref, start: Any, count: int, stride: int) -> jax.Array:
    """``count`` 32-bit rows from ``start``, ``stride`` apart, of a 2-D ref whose lanes may fold into several rows."""
    folds = ref.shape[-1] // LANES
    if folds == 1:
        rows: jax.Array = ref[pl.ds(start, count, stride), :]
        return rows
    flat = ref.reshape(ref.shape[0] * folds, LANES)
    return jnp.concatenate([flat[pl.ds(start * folds + i, count, stride * folds), :] for i in range(folds)], axis=1)


def load_kv(geo: Geometry, pages: Ref, head: Any, keep: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Takes K and V of one head out of fetched pages.

    Args:
        geo: the kernel's sizes.
        pages: ``[pages, page_size, stride, p, D']`` of the cache's dtype in VMEM.
        head: KV head.
        keep: ``[tokens, D']`` bool, or None to keep all; rows that are not kept become zero, whatever they held.

    Returns:
        (k, v), each ``[tokens, D']`` of the compute dtype.
    """
    load = _load_kv_by_index if geo.interpret else _load_kv_by_word
    k, v = load(geo, pages, head, keep)
    return k.astype(geo.compute_dtype), v.astype(geo.compute_dtype)


def _load_kv_by_index(geo: Geometry, pages: Ref, head: Any, keep: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    tokens = pages.shape[0] * geo.page_size
    per_word = max(geo.pack // 2, 1)
    if geo.pack == 1:
        places = ((2 * head, 0), (2 * head + 1, 0))
    else:
        # A head index may be traced, and the place within a word must then be picked by value.
        word, place = head // per_word, 2 * (head % per_word)
        both = pages[:, :, word].reshape(tokens, geo.pack, geo.lanes)
        index = jax.lax.broadcasted_iota(jnp.int32, both.shape, 1)
        wide = both.astype(jnp.float32)
        pair = [jnp.where(index == place + i, wide, 0).sum(1) for i in (0, 1)]
        return _zeroed(pair[0].astype(geo.kv_dtype), keep), _zeroed(pair[1].astype(geo.kv_dtype), keep)
    k, v = (pages[:, :, word, place].reshape(tokens, geo.lanes) for word, place in places)
    return _zeroed(k, keep), _zeroed(v, keep)


def _load_kv_by_word(geo: Geometry, pages: Ref, head: Any, keep: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    tokens = pages.shape[0] * geo.page_size
    rows = pages.bitcast(jnp.uint32).reshape(tokens * geo.stride, geo.lanes)
    if geo.pack == 1:
        k, v = (_zeroed(_rows(rows, 2 * head + i, tokens, geo.stride), keep) for i in (0, 1))
        return pltpu.bitcast(k, geo.kv_dtype), pltpu.bitcast(v, geo.kv_dtype)
    per_word = geo.pack // 2
    word = _zeroed(_rows(rows, head // per_word, tokens, geo.stride), keep)
    bits, first = 32 // geo.pack, 2 * (head % per_word)
    narrow = _UINT[geo.pack]
    k, v = ((word >> (bits * (first + i))).astype(narrow) for i in (0, 1))
    return pltpu.bitcast(k, geo.kv_dtype), pltpu.bitcast(v, geo.kv_dtype)


def _zeroed(rows: jax.Array, keep: jax.Array | None) -> jax.Array:
    return rows if keep is None else jnp.where(keep, rows, jnp.zeros_like(rows))


def load_queries(geo: Geometry, ref: Ref) -> jax.Array:
    """Reads ``[tokens, G / p, p, D']`` of q as the matrix ``[tokens * G, D']`` of the compute dtype."""
    tokens = ref.shape[0]
    if geo.interpret:
        plain: jax.Array = ref[...].reshape(tokens * geo.group, geo.lanes)
        return plain.astype(geo.compute_dtype)
    words = tokens * geo.group // geo.io_pack
    rows = _rows(ref.bitcast(jnp.uint32).reshape(words, geo.lanes), 0, words, 1)
    return pltpu.bitcast(rows, geo.io_dtype).astype(geo.compute_dtype)


def store_rows(geo: Geometry, ref: Ref, rows: jax.Array) -> None:
    """Writes ``[tokens * G, D']`` float32 into ``[tokens, G / p, p, D']``: the inverse of ``load_queries``."""
    rows = rows.astype(ref.dtype)
    if geo.interpret:
        ref[...] = rows.reshape(ref.shape)
        return
    words = rows.shape[0] * ref.dtype.itemsize // 4
    packed = pltpu.bitcast(rows, jnp.uint32)
    folds = rows.shape[1] // LANES
    flat = ref.bitcast(jnp.uint32).reshape(words * folds, LANES)
    for i in range(folds):
        flat[pl.ds(i, words, folds), :] = packed[:, i * LANES : (i + 1) * LANES]
