"""Random steps for the TPU kernel, the float64 oracle, and what a run must leave behind."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as mosaic_interpret
from jax.experimental.pallas import tpu as pltpu

from engine.attention import AttentionMetadata
from engine.attention.impl.tpu.block_sizes import BlockSizes
from engine.attention.impl.tpu.tpu_step import ragged_paged_attention_tpu
from engine.attention.metadata import locate_new_tokens
from engine.attention.options import AttentionOptions, HeadArrays
from engine.kv.layout import KVLayout

# Small blocks, so that short sequences cross chunks, blocks, items and buffers.
SMALL = BlockSizes(
    decode_fetch_pages=16, decode_chunk_pages=8, prefill_queries=16, prefill_fetch_pages=16, prefill_chunk_pages=8
)


@dataclass(frozen=True)
class Step:
    """One step in NumPy; the pool holds NaN wherever no sequence owns a slot."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    fused: np.ndarray
    page_table: np.ndarray
    cu_q_lens: np.ndarray
    kv_lens: np.ndarray
    page_size: int


def make_step(
    seed: int,
    seqs: list[tuple[int, int]],
    *,
    heads: int = 2,
    group: int = 4,
    head_dim: int = 128,
    page_size: int = 16,
    dtype: Any = jnp.bfloat16,
    padding: int = 3,
    contiguous: bool = False,
) -> Step:
    """A step of ``seqs``, each (q_len, kv_len); ``padding`` tokens past the end hold NaN."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    q_lens, kv_lens = (np.array(x, np.int32) for x in zip(*seqs, strict=True))
    pages = -(-kv_lens // page_size)
    total, width = int(pages.sum()) + 4, max(int(pages.max()), 1) + 1
    free = np.arange(1, total) if contiguous else rng.permutation(np.arange(1, total))
    table, at = np.zeros((len(seqs), width), np.int32), 0
    layout = KVLayout.create(head_num=heads, head_dim=head_dim, dtype=dtype, page_size=page_size, platform="tpu")
    rows, lanes = layout.rows, layout.lanes
    fused = np.full((total * page_size, rows, lanes), np.nan, np.float32)
    for b, count in enumerate(pages):
        table[b, :count] = free[at : at + count]
        at += count
        cached = kv_lens[b] - q_lens[b]
        slots = (table[b, :count, None] * page_size + np.arange(page_size)).reshape(-1)[:cached]
        fused[slots] = 0
        fused[slots, : 2 * heads, :head_dim] = rng.standard_normal((cached, 2 * heads, head_dim))
    tokens = int(q_lens.sum()) + padding
    cu = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)

    def fresh(count: int) -> np.ndarray:
        values = rng.standard_normal((tokens, count, head_dim)).astype(np.float32)
        values[cu[-1] :] = np.nan
        return values

    io_dtype = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
    return Step(
        q=fresh(heads * group).astype(io_dtype),
        k=fresh(heads).astype(io_dtype),
        v=fresh(heads).astype(io_dtype),
        fused=fused.astype(dtype),
        page_table=table,
        cu_q_lens=cu,
        kv_lens=kv_lens,
        page_size=page_size,
    )


def oracle(
    step: Step,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,
    k_scale: np.ndarray | None = None,
    v_scale: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Out ``[T, Hq, D]`` and log-sum-exp ``[T, Hq]`` in float64, and the pool after the write, bit for bit."""
    tokens, q_heads, head_dim = step.q.shape
    heads = step.k.shape[1]
    out, lse = np.zeros(step.q.shape), np.full((tokens, q_heads), -np.inf)
    pool = step.fused.copy()
    ks, vs = (np.ones(heads) if s is None else np.asarray(s, np.float64) for s in (k_scale, v_scale))
    for b, kv_len in enumerate(step.kv_lens):
        start, end = step.cu_q_lens[b : b + 2]
        if kv_len == 0:  # sees nothing, writes nothing
            lse[start:end] = -np.inf if sinks is None else sinks
            continue
        first = kv_len - (end - start)
        slots = (step.page_table[b][:, None] * step.page_size + np.arange(step.page_size)).reshape(-1)[:kv_len]
        new = slots[first:] if end > start else slots[:0]
        pool[new] = 0
        pool[new, 0 : 2 * heads : 2, :head_dim] = stored(step.k[start:end], ks, pool.dtype)
        pool[new, 1 : 2 * heads : 2, :head_dim] = stored(step.v[start:end], vs, pool.dtype)
        if end == start:
            continue
        rows = pool[slots].astype(np.float64)
        keys = rows[:, 0 : 2 * heads : 2, :head_dim] * ks[:, None]
        values = rows[:, 1 : 2 * heads : 2, :head_dim] * vs[:, None]
        at_q, at_k = first + np.arange(end - start)[:, None], np.arange(kv_len)[None]
        seen = (at_k <= at_q) & (at_k > at_q - (sliding_window or 1 << 40))
        for h in range(q_heads):
            s = step.q[start:end, h].astype(np.float64) @ keys[:, h * heads // q_heads].T / head_dim**0.5
            s = s if soft_cap is None else soft_cap * np.tanh(s / soft_cap)
            s = np.where(seen, s, -np.inf)
            peak = s.max(1, keepdims=True)
            p = np.exp(s - peak)
            total = p.sum(1) + (0 if sinks is None else np.exp(sinks[h] - peak[:, 0]))
            out[start:end, h] = p @ values[:, h * heads // q_heads] / total[:, None]
            lse[start:end, h] = peak[:, 0] + np.log(total)
    return out, lse, pool


def stored(x: np.ndarray, scale: np.ndarray, dtype: Any) -> np.ndarray:
    """New rows as the cache keeps them."""
    x = jnp.asarray(x)
    return np.asarray((x if (scale == 1).all() else x * jnp.asarray(1 / np.float32(scale))[:, None]).astype(dtype))


def run(
    step: Step,
    *,
    races: bool = False,
    eager: bool = False,
    blocks: BlockSizes = SMALL,
    sinks: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    page_table: np.ndarray | None = None,
    slots: np.ndarray | None = None,
    by_table: bool = True,
    **options: Any,
) -> tuple[np.ndarray, ...]:
    """Runs the kernel in the interpreter, all memory NaN at first; a surplus semaphore or a race fails.

    A copy runs when it is waited for, which finds a missing wait; with ``eager`` it runs at once, which finds a start
    that no code waits for. ``page_table`` and ``slots`` replace the step's; without ``by_table``, or where they are
    replaced, the kernel reads slots.
    """
    mode: Any = "eager" if eager else "on_wait"
    params = pltpu.InterpretParams(detect_races=races, dma_execution_mode=mode)
    printed = io.StringIO()
    layer = AttentionOptions(step.page_size, step.q.shape[2] ** -0.5, **options)
    described = (step.page_table, step.cu_q_lens, step.kv_lens)
    positions, located = locate_new_tokens(*described, num_tokens=step.q.shape[0], page_size=step.page_size, xp=np)
    by_table = by_table and slots is None
    metadata = AttentionMetadata(*described, located if slots is None else slots, positions, by_table)
    metadata = dataclasses.replace(metadata, **{} if page_table is None else {"page_table": page_table})
    heads = HeadArrays(*(None if x is None else jnp.asarray(x) for x in (sinks, k_scale, v_scale)))
    try:
        with contextlib.redirect_stdout(printed):
            results = jax.jit(
                lambda fused, q, k, v, metadata, heads: ragged_paged_attention_tpu(
                    q, k, v, fused, metadata, heads, layer, generation="v6e", blocks=blocks, interpret=params
                )
            )(step.fused, step.q, step.k, step.v, metadata, heads)
            results = tuple(np.asarray(x) for x in results)
        raced = races and mosaic_interpret.races is not None and mosaic_interpret.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert "non-zero count" not in printed.getvalue(), printed.getvalue()
    assert not raced, "the interpreter found a race"
    return results


def check(step: Step, *, races: bool = False, eager: bool = False, blocks: BlockSizes = SMALL, **options: Any) -> None:
    """Runs a step and compares output, log-sum-exp and every byte of the pool with the oracle."""
    wants_lse, by_table = options.pop("return_lse", False), options.pop("by_table", True)
    results = run(step, races=races, eager=eager, blocks=blocks, return_lse=wants_lse, by_table=by_table, **options)
    numpy_options = {name: value for name, value in options.items() if value is not None}
    out, lse, pool = oracle(step, **numpy_options)
    live = int(step.cu_q_lens[-1])
    assert not results[0][live:].astype(np.float32).any(), "outputs past the last token are not zero"
    # bfloat16 keeps 8 bits: q and p are rounded (2**-9 each), out once more; averaging keeps values below about 3.
    tolerance = 1e-5 if step.q.dtype == np.float32 else 2e-2
    np.testing.assert_allclose(results[0].astype(np.float64), out, atol=tolerance, rtol=tolerance)
    if wants_lse:
        # q is rounded to 8 bits after scaling: a logit of up to about 6 moves by 2**-9 of that.
        np.testing.assert_allclose(results[2], lse, atol=1e-5 if step.q.dtype == np.float32 else 3e-2)
    np.testing.assert_array_equal(results[1].view(np.uint8), pool.view(np.uint8))
