"""Queries and results in VMEM: by token and word, as in HBM, so that one DMA moves what an item has.

A word holds the same lane of p query heads. The rows of a KV head's matrix operand are ordered by word, query and place
in the word: so one strided load or store takes the rows of a word, and nothing is transposed. The words of a decode row
lie together. The interpreter has no ref bitcast or reshape; there plain indexing takes the same values.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.attention.impl.tpu.contract.geometry import Geometry, Tile
from engine.attention.impl.tpu.contract.scratch import Ref
from engine.kv.layout import LANES, SUBLANES


def _flat(ref: Ref) -> Ref:
    """``[queries, words, p, 128]`` as 32-bit words ``[queries * words, 128]``."""
    return ref.bitcast(jnp.uint32).reshape(ref.shape[0] * ref.shape[1], LANES)


def scale_queries(geo: Geometry, ref: Ref, tile: Tile) -> None:
    """Multiplies an item's queries ``[queries, stride, p, 128]`` by ``q_scale``, in float32 and in place."""
    if geo.interpret:
        ref[...] = (ref[...].astype(jnp.float32) * geo.q_scale).astype(geo.io_dtype)
        return
    flat = _flat(ref)
    queries = min(tile.queries, SUBLANES)
    size = -(-queries * geo.q_stride // SUBLANES) * SUBLANES

    def scale(index: Any, _: None) -> None:
        rows = pl.ds(index * size, size)
        plain = pltpu.bitcast(flat[rows], geo.io_dtype).astype(jnp.float32)
        flat[rows] = pltpu.bitcast((plain * geo.q_scale).astype(geo.io_dtype), jnp.uint32)

    jax.lax.fori_loop(0, tile.queries // queries, scale, None)


def load_queries(geo: Geometry, ref: Ref, head: Any, tile: Tile) -> jax.Array:
    """The rows ``[rows, D']`` of one KV head in the compute dtype, of ``ref[queries, stride, p, 128]``."""
    count = tile.rows // (tile.queries * geo.io_pack)  # of a decode row, more than the group has
    first = head * geo.group_words
    if geo.interpret:
        at = [jnp.minimum(geo.q_word(first + i, f), geo.q_stride - 1) for i in range(count) for f in range(geo.folds)]
        words = jnp.stack([ref[: tile.queries, word] for word in at]).reshape(count, geo.folds, -1, LANES)
        rows: jax.Array = words.swapaxes(1, 2).reshape(tile.rows, geo.lanes)
        return rows.astype(geo.compute_dtype)
    flat = _flat(ref)
    if tile.queries == 1 and geo.folds == 1:
        words = flat[pl.ds(first, count), :]
    else:

        def load(word: Any) -> jax.Array:
            at = [pl.ds(geo.q_word(word, fold), tile.queries, geo.q_stride) for fold in range(geo.folds)]
            return jnp.concatenate([flat[part, :] for part in at], axis=1)

        words = jnp.concatenate([load(first + i) for i in range(count)], axis=0)
    return pltpu.bitcast(words, geo.io_dtype).astype(geo.compute_dtype)


def store_rows(geo: Geometry, ref: Ref, head: Any, tile: Tile, rows: jax.Array) -> None:
    """Writes a KV head's results ``[rows, D']`` float32 of a block of queries to ``ref[queries, stride, p, 128]``."""
    span = tile.queries * geo.io_pack
    for i, fold in itertools.product(range(geo.group_words), range(geo.folds)):
        part = rows[i * span : (i + 1) * span, fold * LANES : (fold + 1) * LANES].astype(geo.io_dtype)
        word = geo.q_word(head * geo.group_words + i, fold)
        if geo.interpret:
            ref[: tile.queries, word] = part.reshape(tile.queries, geo.io_pack, LANES)
        else:
            _flat(ref)[pl.ds(word, tile.queries, geo.q_stride), :] = pltpu.bitcast(part, jnp.uint32)


def store_token(geo: Geometry, ref: Ref, rows: list[jax.Array]) -> None:
    """Writes a decode row's results, ``[G, D']`` float32 of each KV head, as the first token of ``ref``."""
    words = len(rows) * geo.group_words
    if pad := -words % SUBLANES:
        rows = [*rows, jnp.zeros((pad * geo.io_pack, geo.lanes), jnp.float32)]
    packed = jnp.concatenate(rows, axis=0).astype(geo.io_dtype)
    size = min(words, geo.q_tile_words)
    for first, fold in itertools.product(range(0, words, size), range(geo.folds)):
        part = packed[first * geo.io_pack : (first + size) * geo.io_pack, fold * LANES : (fold + 1) * LANES]
        word = geo.q_word(first, fold)
        if geo.interpret:
            ref[0, word : word + size] = part.reshape(size, geo.io_pack, LANES)
        else:
            _flat(ref)[pl.ds(word, size), :] = pltpu.bitcast(part, jnp.uint32)


def store_lse(geo: Geometry, ref: Ref, tile: Tile, lse: jax.Array) -> None:
    """Writes the log-sum-exp ``[rows, 128]`` of a KV head to ``ref[G / p, queries * p, 1, 128]``, in their order."""
    span = tile.queries * geo.io_pack
    for word in range(geo.group_words):
        part = lse[word * span : (word + 1) * span]
        if geo.interpret:
            ref[word, :span] = part.reshape(span, 1, LANES)
        else:
            ref.reshape(ref.shape[0] * ref.shape[1], LANES)[pl.ds(word * ref.shape[1], span), :] = part


def store_zeros(geo: Geometry, ref: Ref, queries: int) -> None:
    """Makes the first ``queries`` tokens of ``ref`` zero."""
    if geo.interpret:
        ref[:queries] = jnp.zeros((queries, *ref.shape[1:]), ref.dtype)
    else:
        _flat(ref)[pl.ds(0, queries * geo.q_stride), :] = jnp.zeros((queries * geo.q_stride, LANES), jnp.uint32)
