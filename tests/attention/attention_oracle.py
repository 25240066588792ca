"""An independent statement of what attention over the fused, paged cache means: NumPy, float64, plain loops.

K and V of each sequence are held separately as [length, H, D]; nothing here imports the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


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

    @property
    def row_tokens(self) -> int:
        return self.columns * self.page_size

    @property
    def pages(self) -> int:
        """Null page, every row's pages, and three that nobody owns."""
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
    contexts: list[tuple[np.ndarray, np.ndarray]] = field(repr=False)  # K, V of each sequence, new tokens included

    def arguments(self) -> dict[str, Any]:
        return {
            "page_table": self.page_table,
            "cu_q_lens": self.cu_q_lens,
            "kv_lens": self.kv_lens,
            "sinks": self.sinks,
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
                    pool[slot, 2 * head] = self.k[token, head]
                    pool[slot, 2 * head + 1] = self.v[token, head]
        return pool

    def expected_out(self) -> np.ndarray:
        """Float64 [T, Hq, D]."""
        geometry = self.geometry
        out = np.zeros(self.q.shape, np.float64)
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
        return out


def make_case(geometry: Geometry, q_lens: list[int], prefix_lens: list[int], seed: int) -> Case:
    """Random-sign normal inputs; sequences' pages are dealt out in random order."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[geometry.dtype]
    heads, dim = geometry.kv_heads, geometry.head_dim
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    q = rng.standard_normal((geometry.tokens, geometry.q_heads, dim)).astype(dtype)
    k, v = (rng.standard_normal((geometry.tokens, heads, dim)).astype(dtype) for _ in range(2))
    pool = rng.standard_normal((geometry.pages * geometry.page_size, 2 * heads, dim)).astype(dtype)
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
        keys = np.concatenate([cached[:, [2 * h for h in range(heads)]], k[new]])
        values = np.concatenate([cached[:, [2 * h + 1 for h in range(heads)]], v[new]])
        contexts.append((keys, values))
    kv_lens = (np.array(prefix_lens) + np.array(q_lens)).astype(np.int32)
    sinks = rng.standard_normal(geometry.q_heads).astype(np.float32) if geometry.sinks else None
    return Case(geometry, q_lens, prefix_lens, q, k, v, pool, page_table, cu_q_lens, kv_lens, sinks, contexts)


def relative_error(got: Any, expected: Any) -> float:
    """Largest difference over the largest expected magnitude."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30))


def same_bits(a: Any, b: Any) -> bool:
    """Equality of bits, so that NaN equals NaN and 0 does not equal -0."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
