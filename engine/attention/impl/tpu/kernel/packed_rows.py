"""Between VMEM and registers: the one place where the kernel knows how rows are packed in words.

The layout law is that of ``engine/kv/layout.py``: row 2h is K_h and row 2h + 1 is V_h. On TPU p consecutive rows share
a 32-bit word (bf16: K_h low, V_h high), so one strided load of every token's word h brings both, and a shift and a
truncation separate them. The interpreter has no ref bitcast or reshape; there plain indexing takes the same values.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.attention.impl.tpu.kernel.geometry import Geometry
from engine.kv.layout import LANES

Ref = Any  # a Pallas memory reference; jax has no public type for it

_UINT = {1: jnp.uint32, 2: jnp.uint16, 4: jnp.uint8}


def load_kv(geo: Geometry, pages: Ref, head: Any, keep: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Takes K and V of one head out of fetched pages.

    Args:
        geo: the kernel's sizes.
        pages: ``[pages, page_size, stride, p, 128]`` of the cache's dtype in VMEM.
        head: index of the KV head.
        keep: ``[tokens, D']`` bool, or None to keep all; what is not kept becomes zero, even NaN.

    Returns:
        (k, v), each ``[tokens, D']`` in the compute dtype.
    """
    load = _load_kv_by_index if geo.interpret else _load_kv_by_word
    k, v = load(geo, pages, head, keep)
    return k.astype(geo.compute_dtype), v.astype(geo.compute_dtype)


def _load_kv_by_index(geo: Geometry, pages: Ref, head: Any, keep: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    tokens = pages.shape[0] * geo.page_size

    def row(index: Any) -> jax.Array:
        """Row ``index`` of every token; the index may be traced, so the place within a word is chosen by a mask."""
        words = [pages[:, :, geo.word(index // geo.pack, fold)] for fold in range(geo.folds)]
        wide = jnp.concatenate(words, axis=-1).reshape(tokens, geo.pack, geo.lanes).astype(jnp.float32)
        place = jax.lax.broadcasted_iota(jnp.int32, wide.shape, 1)
        return jnp.where(place == index % geo.pack, wide, 0).sum(1).astype(geo.kv_dtype)

    return _zeroed(row(2 * head), keep), _zeroed(row(2 * head + 1), keep)


def _load_kv_by_word(geo: Geometry, pages: Ref, head: Any, keep: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    tokens = pages.shape[0] * geo.page_size
    words = pages.bitcast(jnp.uint32).reshape(tokens * geo.stride, LANES)

    def rows(row_word: Any) -> jax.Array:
        parts = [words[pl.ds(geo.word(row_word, fold), tokens, geo.stride), :] for fold in range(geo.folds)]
        return _zeroed(parts[0] if geo.folds == 1 else jnp.concatenate(parts, axis=1), keep)

    if geo.pack == 1:
        return pltpu.bitcast(rows(2 * head), geo.kv_dtype), pltpu.bitcast(rows(2 * head + 1), geo.kv_dtype)
    per_word = geo.pack // 2
    word = rows(head // per_word)
    bits, first = 32 // geo.pack, 2 * (head % per_word)
    narrow = _UINT[geo.pack]
    k, v = ((word >> (bits * (first + i))).astype(narrow) for i in (0, 1))
    return pltpu.bitcast(k, geo.kv_dtype), pltpu.bitcast(v, geo.kv_dtype)


def _zeroed(rows: jax.Array, keep: jax.Array | None) -> jax.Array:
    return rows if keep is None else jnp.where(keep, rows, jnp.zeros_like(rows))


def load_queries(geo: Geometry, ref: Ref, rows: int) -> jax.Array:
    """Reads the first ``rows`` of ``[queries, G / p, p, D']`` as a matrix ``[rows, D']`` of the compute dtype."""
    total = ref.shape[0] * geo.group
    if geo.interpret:
        plain: jax.Array = ref[...].reshape(total, geo.lanes)[:rows]
        return plain.astype(geo.compute_dtype)
    flat = ref.bitcast(jnp.uint32).reshape(total // geo.io_pack * geo.folds, LANES)
    words = [flat[pl.ds(i, rows // geo.io_pack, geo.folds), :] for i in range(geo.folds)]
    return pltpu.bitcast(jnp.concatenate(words, axis=1), geo.io_dtype).astype(geo.compute_dtype)


def store_rows(geo: Geometry, ref: Ref, rows: jax.Array) -> None:
    """Writes ``[rows, D']`` float32 as the first rows of ``[queries, G / p, p, D']``."""
    rows = rows.astype(ref.dtype)
    total = ref.shape[0] * geo.group
    if geo.interpret:
        ref[...] = jnp.pad(rows, [(0, total - rows.shape[0]), (0, 0)]).reshape(ref.shape)
        return
    folds, packed = rows.shape[1] // LANES, pltpu.bitcast(rows, jnp.uint32)
    flat = ref.bitcast(jnp.uint32).reshape(total * ref.dtype.itemsize // 4 * folds, LANES)
    for i in range(folds):
        flat[pl.ds(i, packed.shape[0], folds), :] = packed[:, i * LANES : (i + 1) * LANES]
