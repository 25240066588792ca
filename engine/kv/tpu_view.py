"""A TPU's stored rows as 32-bit words of 128 lanes: the same bytes, in the order in which XLA keeps them.

XLA tiles ``[S, R, D']`` by 8 rows (or R, where it is fewer) and 128 lanes, and packs p rows of a tile into one 32-bit
word. A view in that order costs no copy for any D'; a plain reshape into words copies the whole buffer for D' over 128.
Tests prove it on compiled programs of each shape (tests/attention_tpu/test_tpu_copies.py).
"""

from __future__ import annotations

import jax
from jax.typing import DTypeLike

from engine.kv.layout import LANES, SUBLANES, packing, padded_rows

TILE_ROWS = 8
# XLA tiles an 8-bit buffer whose rows are a multiple of this differently; no view of several folds is free there.
LARGE_TILE_ROWS = 4 * SUBLANES


def view_is_free(rows: int, lanes: int, dtype: DTypeLike) -> bool:
    """Whether ``[S, rows, lanes]`` is padded for a TPU and can be viewed in words without a copy."""
    padded = lanes % LANES == 0 and rows % 2 == 0 and padded_rows(rows // 2, dtype) == rows
    return padded and (lanes == LANES or packing(dtype) < 4 or rows % LARGE_TILE_ROWS != 0)


def view_words(stored: jax.Array) -> jax.Array:
    """``[S, R, D']`` as ``[S, R / p * D' / 128, p, 128]``; word ``word_of`` holds p rows of one fold of 128 lanes."""
    slots, rows, lanes = stored.shape
    tile, pack = min(rows, TILE_ROWS), packing(stored.dtype)
    tiles = stored.reshape(slots, rows // tile, tile, lanes // LANES, LANES).swapaxes(2, 3)
    return tiles.reshape(slots, rows // pack * (lanes // LANES), pack, LANES)


def unview_words(words: jax.Array, rows: int, lanes: int) -> jax.Array:
    """Inverse of ``view_words``: back to ``[S, rows, lanes]``."""
    slots, tile = words.shape[0], min(rows, TILE_ROWS)
    tiles = words.reshape(slots, rows // tile, lanes // LANES, tile, LANES).swapaxes(2, 3)
    return tiles.reshape(slots, rows, lanes)


def word_of(row_word: jax.Array | int, fold: int, folds: int, tile_words: int) -> jax.Array | int:
    """Index in the view of a slot's ``row_word``-th p rows, lanes ``128 * fold …``; a tile has ``tile_words`` words."""
    if folds == 1:
        return row_word
    return row_word // tile_words * (folds * tile_words) + fold * tile_words + row_word % tile_words
