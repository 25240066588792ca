"""An independent statement of what attention over the fused, paged cache means: NumPy, float64, plain loops.

K and V of each sequence are held separately as [length, H, D]; nothing here imports the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


@dataclass(frozen=True)
class Geometry:
    """The static half of a case: a compiled program serves every case of one geometry."""

    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    tokens: int = 48
    rows: int = 4
    columns: int = 6
    dtype: str = "float32"
    window: int | None = None
    soft_cap: float | None = None
    sm_scale: float | None = None
    sinks: bool = False
    cache_dtype: str | None = None  # where it is not that of the tokens
    scales: bool = False

    @property
    def row_tokens(self) -> int:
        return self.columns * self.page_size

    @property
    def pages(self) -> int:
        """Null page, every row's pages, and three that no row owns."""
        return 1 + self.rows * self.columns + 3

    def options(self) -> dict[str, Any]:
        return {
            "page_size": self.page_size,
            "sm_scale": self.sm_scale,
            "sliding_window": self.window,
            "soft_cap": self.soft_cap,
        }


@dataclass
class Case:
    """One call's inputs, and what it must give."""

    geometry: Geometry
    q_lens: list[int]
    prefix_lens: list[int]
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pool: np.ndarray
    page_table: np.ndarray
    cu_q_lens: np.ndarray
    kv_lens: np.ndarray
    sinks: np.ndarray | None
    k_scale: np.ndarray | None
    v_scale: np.ndarray | None
    contexts: list[tuple[np.ndarray, np.ndarray]] = field(repr=False)  # K, V of each sequence, new tokens included

    def arguments(self) -> dict[str, Any]:
        return {
            "page_table": self.page_table,
            "cu_q_lens": self.cu_q_lens,
            "kv_lens": self.kv_lens,
            "sinks": self.sinks,
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
            **self.geometry.options(),
        }

    def slot(self, row: int, position: int) -> int:
        page, offset = divmod(position, self.geometry.page_size)
        return int(self.page_table[row, page]) * self.geometry.page_size + offset

    def owned_slots(self, *, new: bool = True) -> np.ndarray:
        """Mask [S] of the slots that hold a token, with or without the new ones."""
        mask = np.zeros(self.pool.shape[0], bool)
        for row, (q_len, prefix) in enumerate(zip(self.q_lens, self.prefix_lens, strict=True)):
            for position in range(prefix + (q_len if new else 0)):
                mask[self.slot(row, position)] = True
        return mask

    def poisoned(self, value: float = np.nan) -> Case:
        """The same case with every slot that holds no cached token filled with ``value``."""
        pool = self.pool.copy()
        pool[~self.owned_slots(new=False)] = value
        return replace(self, pool=pool)

    def expected_pool(self) -> np.ndarray:
        pool = self.pool.copy()
        for row, q_len in enumerate(self.q_lens):
            for i in range(q_len):
                token, slot = self.cu_q_lens[row] + i, self.slot(row, self.prefix_lens[row] + i)
                for head in range(self.geometry.kv_heads):
                    pool[slot, 2 * head] = _stored(self.k[token, head], self.k_scale, head, pool.dtype)
                    pool[slot, 2 * head + 1] = _stored(self.v[token, head], self.v_scale, head, pool.dtype)
        return pool

    def expected_out(self) -> np.ndarray:
        """Float64 [T, Hq, D]."""
        return self.expected()[0]

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Float64 outputs [T, Hq, D] and log-sum-exps [T, Hq]."""
        geometry = self.geometry
        out, lse = np.zeros(self.q.shape, np.float64), np.full(self.q.shape[:2], -np.inf)
        group = geometry.q_heads // geometry.kv_heads
        scale = geometry.head_dim**-0.5 if geometry.sm_scale is None else geometry.sm_scale
        for row, q_len in enumerate(self.q_lens):
            keys, values = (half.astype(np.float64) for half in self.contexts[row])
            for i in range(q_len):
                token, position = self.cu_q_lens[row] + i, self.prefix_lens[row] + i
                first = 0 if geometry.window is None else max(0, position - geometry.window + 1)
                for head in range(geometry.q_heads):
                    seen = slice(first, position + 1)
                    logits = keys[seen, head // group] @ self.q[token, head].astype(np.float64) * scale
                    if geometry.soft_cap is not None:
                        logits = geometry.soft_cap * np.tanh(logits / geometry.soft_cap)
                    extra = [] if self.sinks is None else [float(self.sinks[head])]
                    peak = max(logits.max(), *extra) if extra else logits.max()
                    weights = np.exp(logits - peak)
                    total = weights.sum() + sum(np.exp(e - peak) for e in extra)
                    out[token, head] = weights @ values[seen, head // group] / total
                    lse[token, head] = peak + np.log(total)
        return out, lse


def _stored(row: np.ndarray, scale: np.ndarray | None, head: int, dtype: Any) -> np.ndarray:
    """A row of K or V as the cache keeps it."""
    return (row if scale is None else row.astype(np.float32) * (np.float32(1) / scale[head])).astype(dtype)


def _context(cached: np.ndarray, fresh: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """True values ``[L, H, D]`` in float64 of cached rows and then of new ones, as the cache keeps them."""
    stored = np.stack([_stored(fresh[:, head], scale, head, cached.dtype) for head in range(fresh.shape[1])], axis=1)
    whole = np.concatenate([cached, stored]).astype(np.float64)
    return whole if scale is None else whole * scale[:, None]


def make_case(geometry: Geometry, q_lens: list[int], prefix_lens: list[int], seed: int) -> Case:
    """Random-sign normal inputs; sequences' pages are dealt out in random order."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[geometry.dtype]
    heads, dim = geometry.kv_heads, geometry.head_dim
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    q = rng.standard_normal((geometry.tokens, geometry.q_heads, dim)).astype(dtype)
    k, v = (rng.standard_normal((geometry.tokens, heads, dim)).astype(dtype) for _ in range(2))
    cache_dtype = DTYPES[geometry.cache_dtype or geometry.dtype]
    pool = rng.standard_normal((geometry.pages * geometry.page_size, 2 * heads, dim)).astype(cache_dtype)
    # Quarters to fours: far from 1, and no value leaves the range of an 8-bit float.
    scales = [2 ** rng.uniform(-2, 2, heads).astype(np.float32) if geometry.scales else None for _ in range(2)]
    ids = 1 + rng.permutation(geometry.pages - 1)
    page_table = np.zeros((geometry.rows, geometry.columns), np.int32)
    contexts = []
    for row, (q_len, prefix) in enumerate(zip(q_lens, prefix_lens, strict=True)):
        count = -(-(prefix + q_len) // geometry.page_size)
        page_table[row, :count], ids = ids[:count], ids[count:]
        slots = [
            page_table[row, p // geometry.page_size] * geometry.page_size + p % geometry.page_size
            for p in range(prefix)
        ]
        new = slice(cu_q_lens[row], cu_q_lens[row] + q_len)
        cached = pool[np.array(slots, int)]
        contexts.append((_context(cached[:, 0::2], k[new], scales[0]), _context(cached[:, 1::2], v[new], scales[1])))
    kv_lens = (np.array(prefix_lens) + np.array(q_lens)).astype(np.int32)
    sinks = rng.standard_normal(geometry.q_heads).astype(np.float32) if geometry.sinks else None
    return Case(geometry, q_lens, prefix_lens, q, k, v, pool, page_table, cu_q_lens, kv_lens, sinks, *scales, contexts)


def relative_error(got: Any, expected: Any) -> float:
    """Largest difference over the largest expected magnitude."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30))


def same_bits(a: Any, b: Any) -> bool:
    """Equality of bits, so that NaN equals NaN and 0 does not equal -0."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
