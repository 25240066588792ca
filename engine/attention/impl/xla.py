"""``impl="xla"``: block-wise attention over pages with online softmax, in plain XLA.

The algorithm is FlashAttention-2's (arXiv 2307.08691) over a paged cache: sequences are taken one after the other, a
sequence's queries in tiles, and a tile walks the context in blocks of whole pages, from the first block that its window
reaches to the last that causality allows. Loop bounds are data, shapes are not: one program serves every length, and
its temporary memory is that of a block. Sequences are computed apart, so each gets the same bits in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from engine.attention.impl.implementation import AttentionResult
from engine.attention.metadata import AttentionMetadata
from engine.attention.options import AttentionOptions, HeadArrays
from engine.kv.layout import extract_k_from_fused_kv, extract_v_from_fused_kv
from engine.kv.narrow import Buffer
from engine.kv.stored import take_pages

BLOCK_TOKENS = 256  # of context: K and V of 8 heads of 128 in float32 are 2 MiB, a core's L2 cache
TILE_TOKENS = 64  # queries of one sequence that walk the context together


class Softmax(NamedTuple):
    """Online softmax of ``R`` query rows per KV head, float32.

    Attributes:
        peak: ``[H, R]`` largest logit so far.
        total: ``[H, R]`` sum of ``exp(logit - peak)``.
        acc: ``[H, R, D]`` the same sum, of weighted values.
    """

    peak: jax.Array
    total: jax.Array
    acc: jax.Array


class Rows(NamedTuple):
    """The results of query rows, float32.

    Attributes:
        out: ``[N, Hq, D]``.
        lse: ``[N, Hq]`` natural log of the softmax's denominator.
    """

    out: jax.Array
    lse: jax.Array


class Tile(NamedTuple):
    """Queries of one sequence: row ``r = token * G + g`` is the ``g``-th query head of its KV head's group.

    Attributes:
        q: ``[H, R, D]`` float32, scaled.
        position: ``[R]`` position of each row in its sequence.
        first_seen: first context position that any row sees.
        end: one past the last context position that any row sees.
    """

    q: jax.Array
    position: jax.Array
    first_seen: jax.Array
    end: jax.Array


def attend_xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: Buffer,
    metadata: AttentionMetadata,
    heads: HeadArrays,
    options: AttentionOptions,
) -> AttentionResult:
    """Attends over a cache that holds the new tokens; see ``Implementation``."""
    num_tokens, num_q_heads, head_dim = q.shape
    walk = _ContextWalk.over(fused_kv, metadata, k.shape[1], head_dim, heads.sinks, options)
    tile_tokens = min(TILE_TOKENS, num_tokens)
    # The last tile of a sequence may reach past the array; a dynamic slice would then slide back over other tokens.
    queries = jnp.pad(q, ((0, tile_tokens), (0, 0), (0, 0)))
    cu_q_lens, kv_lens = jnp.asarray(metadata.cu_q_lens), jnp.asarray(metadata.kv_lens)

    def attend_tile(size: int, row: jax.Array, first: jax.Array, done: Rows) -> Rows:
        """Attends queries ``[first, first + size)`` of sequence ``row``; rows past its last query become zero."""
        start, q_len = cu_q_lens[row], cu_q_lens[row + 1] - cu_q_lens[row]
        chunk = lax.dynamic_slice(queries, _index(start + first, 0, 0), (size, num_q_heads, head_dim))
        result = walk.attend(chunk, row, kv_lens[row] - q_len + first, kv_lens[row])
        live = (first + jnp.arange(size, dtype=jnp.int32) < q_len)[:, None]
        out = jnp.where(live[..., None], result.out, 0.0)
        lse = jnp.where(live, result.lse, -jnp.inf)
        # What spills over the sequence's end is overwritten by the sequence that follows.
        return Rows(
            lax.dynamic_update_slice(done.out, out, _index(start + first, 0, 0)),
            lax.dynamic_update_slice(done.lse, lse, _index(start + first, 0)),
        )

    def attend_sequence(row: jax.Array, done: Rows) -> Rows:
        q_len = cu_q_lens[row + 1] - cu_q_lens[row]
        decodes = jnp.where(q_len == 1, 1, 0)
        done = lax.fori_loop(jnp.int32(0), decodes, lambda i, done: attend_tile(1, row, i, done), done)
        tiles = jnp.where(q_len > 1, -(-q_len // tile_tokens), 0)
        extended: Rows = lax.fori_loop(
            jnp.int32(0), tiles, lambda i, done: attend_tile(tile_tokens, row, i * tile_tokens, done), done
        )
        return extended

    # Float32 until the end: XLA's CPU compiler may convert all of a 16-bit carry to write a part of it.
    none = Rows(jnp.zeros(queries.shape, jnp.float32), jnp.full(queries.shape[:2], -jnp.inf, jnp.float32))
    out, lse = lax.fori_loop(jnp.int32(0), jnp.int32(kv_lens.shape[0]), attend_sequence, none)
    return AttentionResult(out[:num_tokens], fused_kv, lse[:num_tokens] if options.return_lse else None)


@dataclass(frozen=True)
class _ContextWalk:
    """Walks the context of one sequence, block by block."""

    fused_kv: Buffer
    page_table: jax.Array
    sink: jax.Array | None
    num_kv_heads: int
    head_dim: int
    options: AttentionOptions
    block_pages: int

    @classmethod
    def over(
        cls,
        fused_kv: Buffer,
        metadata: AttentionMetadata,
        num_kv_heads: int,
        head_dim: int,
        sinks: jax.Array | None,
        options: AttentionOptions,
    ) -> _ContextWalk:
        """Prepares a step: the page table gets whole blocks of columns, so that no block's slice slides back."""
        block_pages = max(1, BLOCK_TOKENS // options.page_size)
        page_table = jnp.asarray(metadata.page_table)
        page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % block_pages)))
        sink = None if sinks is None else jnp.asarray(sinks, jnp.float32).reshape(num_kv_heads, -1)
        return cls(fused_kv, page_table, sink, num_kv_heads, head_dim, options, block_pages)

    def attend(self, chunk: jax.Array, row: jax.Array, position: jax.Array, kv_len: jax.Array) -> Rows:
        """Attends consecutive queries of sequence ``row``.

        Args:
            chunk: ``[N, Hq, D]`` queries, the first at ``position``.
            row: its row of the page table.
            position: int32 position of the first query.
            kv_len: the sequence's length, new tokens included.

        Returns:
            Output and log-sum-exp, meaningless past the sequence's end.
        """
        tile = self._tile(chunk, position, kv_len)
        block_tokens = self.block_pages * self.options.page_size
        state = self._start(tile)
        # Blocks stand at fixed positions, so how a prompt is cut into chunks does not change the sums.
        state = lax.fori_loop(
            tile.first_seen // block_tokens,
            -(-tile.end // block_tokens),
            lambda block, state: self._attend_block(tile, row, block, state),
            state,
        )
        out = state.acc / jnp.where(state.total > 0, state.total, 1.0)[..., None]
        size, num_q_heads, head_dim = chunk.shape
        out = out.reshape(self.num_kv_heads, size, -1, head_dim).transpose(1, 0, 2, 3)
        lse = (state.peak + jnp.log(state.total)).reshape(self.num_kv_heads, size, -1).transpose(1, 0, 2)
        return Rows(out.reshape(size, num_q_heads, head_dim), lse.reshape(size, num_q_heads))

    def _tile(self, chunk: jax.Array, position: jax.Array, kv_len: jax.Array) -> Tile:
        size, num_q_heads, head_dim = chunk.shape
        group = num_q_heads // self.num_kv_heads
        q = chunk.astype(jnp.float32) * self.options.sm_scale
        q = q.reshape(size, self.num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
        q = q.reshape(self.num_kv_heads, size * group, head_dim)
        window = self.options.sliding_window
        first_seen = jnp.zeros_like(position) if window is None else jnp.maximum(0, position - window + 1)
        rows = position + jnp.arange(size * group, dtype=jnp.int32) // group
        return Tile(q, rows, first_seen, jnp.minimum(position + size, kv_len))

    def _start(self, tile: Tile) -> Softmax:
        heads, rows, _ = tile.q.shape
        acc = jnp.zeros(tile.q.shape, jnp.float32)
        if self.sink is None:
            return Softmax(jnp.full((heads, rows), -jnp.inf, jnp.float32), jnp.zeros((heads, rows), jnp.float32), acc)
        # A sink is a logit without a value: it counts as if it had come first.
        return Softmax(jnp.tile(self.sink, (1, rows // self.sink.shape[1])), jnp.ones((heads, rows), jnp.float32), acc)

    def _attend_block(self, tile: Tile, row: jax.Array, block: jax.Array, state: Softmax) -> Softmax:
        keys, values, position = self._load(row, block)
        alive = (position >= tile.first_seen) & (position < tile.end)
        visible = (position[None, :] <= tile.position[:, None]) & alive[None, :]
        if self.options.sliding_window is not None:
            visible &= position[None, :] > tile.position[:, None] - self.options.sliding_window
        logits = jnp.einsum("hrd,hld->hrl", tile.q, keys)
        if self.options.soft_cap is not None:
            logits = self.options.soft_cap * jnp.tanh(logits / self.options.soft_cap)
        logits = jnp.where(visible[None], logits, -jnp.inf)
        # A dead slot may hold NaN, and 0 * NaN is NaN.
        return _fold(state, logits, jnp.where(alive[None, :, None], values, 0.0))

    def _load(self, row: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys and values ``[H, L, D]`` float32 of a block, and the positions ``[L]`` they stand at."""
        # Tied to the loop's counter, or XLA's CPU compiler hoists a conversion of the whole pool out of the loop.
        fused_kv, block = lax.optimization_barrier((self.fused_kv, block))
        pages = lax.dynamic_slice(self.page_table, _index(row, block * self.block_pages), (1, self.block_pages))[0]
        tokens = self.block_pages * self.options.page_size
        context = take_pages(fused_kv, pages, self.options.page_size, self.num_kv_heads, self.head_dim)
        context = context.reshape(tokens, 2 * self.num_kv_heads, self.head_dim)
        keys, values = extract_k_from_fused_kv(context), extract_v_from_fused_kv(context)
        keys, values = (half.swapaxes(0, 1) for half in (keys, values))
        return keys, values, block * tokens + jnp.arange(tokens, dtype=jnp.int32)


def _index(*starts: jax.Array | int) -> tuple[jax.Array, ...]:
    """Starts of a dynamic slice as int32: under jax_enable_x64 a literal would be int64, and they must be alike."""
    return tuple(jnp.asarray(start, jnp.int32) for start in starts)


def _fold(state: Softmax, logits: jax.Array, values: jax.Array) -> Softmax:
    """Takes a block's logits ``[H, R, L]`` and values ``[H, L, D]`` into the state."""
    peak = jnp.maximum(state.peak, logits.max(-1))
    # A row that has seen nothing has peak -inf, and -inf - -inf is NaN.
    base = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = jnp.exp(logits - base[..., None])
    decay = jnp.exp(state.peak - base)
    return Softmax(
        peak,
        state.total * decay + weights.sum(-1),
        state.acc * decay[..., None] + jnp.einsum("hrl,hld->hrd", weights, values),
    )
