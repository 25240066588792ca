"""Between VMEM and registers: the one place where the kernel knows how rows are packed in words.

The layout law is that of ``engine/kv/layout.py``: row 2h is K_h and row 2h + 1 is V_h. On TPU p consecutive rows share
a 32-bit word (bf16: K_h low, V_h high), so one strided load of every token's word h brings both, and a shift and a
truncation separate them. The interpreter has no ref bitcast or reshape; there plain indexing takes the same values.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.attention.impl.tpu.contract.geometry import Geometry
from engine.attention.impl.tpu.contract.scratch import Ref
from engine.kv.layout import LANES

MERGED_WORDS = 64  # words of k that are merged at once: 8 registers of k, and 8 of v

_UINT = {1: jnp.uint32, 2: jnp.uint16, 4: jnp.uint8}


def load_kv(geo: Geometry, pages: Ref, head: Any, keep: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Takes K and V of one head out of fetched pages ``[pages, page_size, stride, p, 128]``.

    ``keep``, ``[tokens, D']`` bool, tells what does not become zero, even where it is NaN; None keeps all. Returns
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


def merge_kv_words(geo: Geometry, k: Ref, v: Ref, merged: Ref, tokens: int) -> None:
    """Interleaves new ``k, v[N, p, 128]`` in row order into ``merged[tokens, H, p, 128]``.

    A word of k holds two rows, of two heads or tokens; a word of the cache K and V of one.
    """
    count = tokens * geo.heads // geo.pack
    if geo.interpret:
        rows = (ref[:count].reshape(tokens, geo.heads, LANES) for ref in (k, v))
        merged[...] = jnp.stack([*rows], axis=2)
        return
    k, v = (ref.bitcast(jnp.uint32).reshape(count, LANES) for ref in (k, v))
    words = merged.bitcast(jnp.uint32).reshape(tokens * geo.words, LANES)
    size = gcd(count, MERGED_WORDS)

    def merge(index: Any, _: None) -> None:
        some = pl.ds(index * size, size)
        k_words, v_words = k[some], v[some]
        words[pl.ds(2 * index * size, size, 2)] = (k_words & 0xFFFF) | (v_words << 16)
        words[pl.ds(2 * index * size + 1, size, 2)] = (k_words >> 16) | (v_words >> 16 << 16)

    jax.lax.fori_loop(0, count // size, merge, None)
