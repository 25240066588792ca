"""What one compiled kernel knows at trace time: heads, dtypes, tiles and block sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from engine.kv.layout import LANES, SUBLANES
from engine.kv.tpu_view import TILE_ROWS, word_of

__all__ = ["LANES", "SUBLANES", "BlockSizes", "Geometry"]


SHORT_ROWS = 128  # rows of q of a short extend: one tile of the matrix unit


@dataclass(frozen=True)
class BlockSizes:
    """How much is fetched and computed at once; fetch and compute blocks are apart.

    Attributes:
        decode_fetch_pages: pages of one DMA block for a decode row.
        decode_chunk_pages: pages of one compute chunk for a decode row; divides the above.
        prefill_queries: query tokens of one work item.
        prefill_fetch_pages: pages of one DMA block for a prefill item.
        prefill_chunk_pages: pages of one compute chunk for a prefill item; divides the above.
    """

    decode_fetch_pages: int
    decode_chunk_pages: int
    prefill_queries: int
    prefill_fetch_pages: int
    prefill_chunk_pages: int


class Tile(NamedTuple):
    """How one kind of item is computed.

    Attributes:
        queries: most query tokens of an item.
        rows: rows of q a KV head, row ``t * G + g``, in whole sublanes; those past the queries hold anything.
        fetch_pages: pages of one DMA block.
        chunk_pages: pages of one compute chunk.
    """

    queries: int
    rows: int
    fetch_pages: int
    chunk_pages: int


@dataclass(frozen=True)
class Geometry:
    """Static sizes of one kernel.

    Attributes:
        heads: KV heads H.
        group: query heads a KV head G.
        lanes: stored elements a row D', a multiple of 128.
        words: stored 32-bit words of 128 lanes a token (engine/kv/tpu_view.py).
        page_size: tokens a page.
        run_pages: pages that one DMA moves where they are contiguous.
        table_pages: page-table entries a sequence, a multiple of ``run_pages``.
        kv_dtype: of the cache.
        compute_dtype: of the matrix operands: bfloat16, or float32 where q or the cache is.
        io_dtype: of q and out in HBM; float32 where an odd group does not fill a word.
        soft_cap: cap of the logits, or None.
        window: sliding window in tokens, or None.
        has_lse: whether log-sum-exp leaves the kernel.
        interpret: whether the interpreter runs it (see ``registers``).
        blocks: the block sizes.
    """

    heads: int
    group: int
    lanes: int
    words: int
    page_size: int
    run_pages: int
    table_pages: int
    kv_dtype: np.dtype[Any]
    compute_dtype: np.dtype[Any]
    io_dtype: np.dtype[Any]
    soft_cap: float | None
    window: int | None
    has_lse: bool
    interpret: bool
    blocks: BlockSizes

    @property
    def pack(self) -> int:
        """Cache rows that share a 32-bit word."""
        return 4 // self.kv_dtype.itemsize

    @property
    def folds(self) -> int:
        """Words that a row of p heads' K or V takes."""
        return self.lanes // LANES

    def word(self, row_word: Any, fold: int) -> Any:
        """The word that holds the ``row_word``-th p rows of a token, lanes ``128 * fold …``."""
        return word_of(row_word, fold, self.folds, min(self.words // self.folds, TILE_ROWS // self.pack))

    @property
    def io_pack(self) -> int:
        """Rows of q that share a 32-bit word."""
        return 4 // self.io_dtype.itemsize

    @property
    def stride(self) -> int:
        """32-bit rows between two tokens in VMEM: odd, so that a strided load meets no bank twice."""
        return self.words | 1

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The kinds of item: decode rows, short extends where a whole block would be far too large, and blocks."""
        blocks, group = self.blocks, self.group
        whole = blocks.prefill_queries
        short = max(SUBLANES, SHORT_ROWS // group // SUBLANES * SUBLANES)
        decode_rows = -(-group // SUBLANES) * SUBLANES
        return (
            Tile(1, decode_rows, blocks.decode_fetch_pages, blocks.decode_chunk_pages),
            *(
                Tile(queries, queries * group, blocks.prefill_fetch_pages, blocks.prefill_chunk_pages)
                for queries in ((short, whole) if 4 * short <= whole else (whole,))
            ),
        )

    @property
    def precision(self) -> str:
        """Matrix precision: what float32 operands promise needs more than one bf16 pass."""
        return "highest" if self.compute_dtype == jnp.float32 else "default"
