"""What a kernel knows when it is compiled: heads, dtypes, and the sizes of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from engine.kv.layout import LANES
from engine.kv.tpu_view import TILE_ROWS, word_of


class Tile(NamedTuple):
    """How one kind of item is computed.

    Attributes:
        queries: the most query tokens of an item.
        rows: rows of q per KV head in whole sublanes, by word of q, query and place in the word, so that one strided
            load takes the rows of a word; those past the queries hold anything.
        fetch_pages: pages of one DMA block.
        chunk_pages: pages of one compute chunk; divides ``fetch_pages``.
        edge_pages: pages of one chunk of keys that some query does not see; divides ``chunk_pages``.
    """

    queries: int
    rows: int
    fetch_pages: int
    chunk_pages: int
    edge_pages: int


@dataclass(frozen=True)
class Geometry:
    """Static sizes of one kernel.

    Attributes:
        heads: KV heads H.
        group: query heads per KV head, G.
        lanes: stored elements per row, D', a multiple of 128.
        words: stored 32-bit words of 128 lanes per token (engine/kv/tpu_view.py).
        q_words: the same of q and out, in the io dtype.
        page_size: tokens per page.
        run_pages: pages that one DMA moves where they are contiguous.
        table_pages: page-table entries per sequence, a multiple of ``run_pages``.
        plan_rows: sequences of the step's plan, those without tokens at the end.
        kv_dtype: dtype of the cache.
        compute_dtype: dtype of the matrix operands: bfloat16, or float32 where q or the cache is.
        io_dtype: dtype of q and out in HBM; float32 where an odd group does not fill a word.
        q_scale: factor on q, which brings the logits into the log2 domain.
        fresh_tokens: new tokens that are merged at once, K and V into rows of the cache; 0 where they come merged.
        soft_cap: cap of the logits, or None.
        window: sliding window in tokens, or None.
        has_lse: whether log-sum-exp leaves the kernel.
        tiles: the kinds of item, by queries: decode rows, perhaps short extends, and whole blocks.
        interpret: whether the kernel runs in the interpreter (see ``packed_rows``).
    """

    heads: int
    group: int
    lanes: int
    words: int
    q_words: int
    page_size: int
    run_pages: int
    table_pages: int
    plan_rows: int
    kv_dtype: np.dtype[Any]
    compute_dtype: np.dtype[Any]
    io_dtype: np.dtype[Any]
    q_scale: float
    fresh_tokens: int
    soft_cap: float | None
    window: int | None
    has_lse: bool
    tiles: tuple[Tile, ...]
    interpret: bool

    @property
    def pack(self) -> int:
        """Cache rows that share a 32-bit word."""
        return 4 // self.kv_dtype.itemsize

    @property
    def folds(self) -> int:
        """Words that a row of p heads' K or V takes."""
        return self.lanes // LANES

    def word(self, row_word: Any, fold: int) -> Any:
        """Index of the word that holds the ``row_word``-th p rows of a token, lanes ``128 * fold …``."""
        return word_of(row_word, fold, self.folds, min(self.words // self.folds, TILE_ROWS // self.pack))

    def q_word(self, row_word: Any, fold: int) -> Any:
        """The same for q and out."""
        return word_of(row_word, fold, self.folds, self.q_tile_words)

    @property
    def q_tile_words(self) -> int:
        """Words of one fold of q or out that lie together."""
        return self.q_words if self.folds == 1 else min(self.q_words // self.folds, TILE_ROWS // self.io_pack)

    @property
    def io_pack(self) -> int:
        """Rows of q that share a 32-bit word."""
        return 4 // self.io_dtype.itemsize

    @property
    def group_words(self) -> int:
        """Words of q, of one fold, that a KV head's queries take."""
        return self.group // self.io_pack

    @property
    def stride(self) -> int:
        """32-bit rows between two tokens in VMEM: odd, so that a strided load uses no bank twice."""
        return self.words | 1

    @property
    def q_stride(self) -> int:
        """The same for q and out."""
        return self.q_words | 1

    @property
    def precision(self) -> str:
        """Matrix precision: float32 operands need more than one bf16 pass."""
        return "highest" if self.compute_dtype == jnp.float32 else "default"
