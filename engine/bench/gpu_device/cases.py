"""The cases of the correctness section: steps for each option, edge and geometry, with their expected results."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from engine.bench.gpu_device.oracle import Attended, attend_row
from engine.bench.gpu_device.shapes import Shape

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """A step, its options, and what surrounds the live tokens.

    Attributes:
        name: what it tests.
        shape: the step; a sequence without new tokens is a padding row.
        window: number of tokens that a query sees, itself included; None: all.
        soft_cap: bound of the logits.
        sinks: whether there is an extra logit per head.
        scales: whether the cache holds keys and values divided by a factor per head.
        lse: whether log-sum-exps are requested and checked.
        padding: number of tokens after the last sequence's.
        columns: number of unused entries in every row of the page table.
    """

    name: str
    shape: Shape
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    scales: bool = False
    lse: bool = False
    padding: int = 0
    columns: int = 1

    @classmethod
    def of(cls, values: dict[str, Any]) -> Case:
        """The case whose ``values`` these are."""
        return cls(**values | {"shape": Shape.of(values["shape"])})

    def values(self) -> dict[str, Any]:
        """Its fields as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Inputs:
    """The arrays of a case, with NaN in all dead memory, and the K and V of each sequence as the cache stores them.

    Attributes:
        q: ``[T, Hq, D]``, NaN in padding tokens; so are k and v.
        k: ``[T, H, D]``.
        v: ``[T, H, D]``.
        pool: ``[S, 2H, D]``, NaN in every slot that holds no cached token.
        page_table: ``[B, P]`` int32.
        cu_q_lens: ``[B + 1]`` int32.
        kv_lens: ``[B]`` int32.
        sinks: ``[Hq]`` float32, or None.
        k_scale: ``[H]`` float32, or None.
        v_scale: ``[H]`` float32, or None.
        written: ``[T]`` the slot of each live token, in order.
        contexts: K and V of each sequence, ``[L, H, D]``.
        expected_pool: ``[S, 2H, D]``, the pool after the step, bit for bit.
    """

    q: Array
    k: Array
    v: Array
    pool: Array
    page_table: npt.NDArray[np.int32]
    cu_q_lens: npt.NDArray[np.int32]
    kv_lens: npt.NDArray[np.int32]
    sinks: Array | None
    k_scale: Array | None
    v_scale: Array | None
    written: npt.NDArray[np.int64]
    contexts: list[tuple[Array, Array]]
    expected_pool: Array


def make_inputs(case: Case, seed: int) -> Inputs:
    """Normally distributed numbers; pages in random order, in a pool with as many unused pages as used ones."""
    rng, shape = np.random.default_rng(seed), case.shape
    dtype = np.dtype(getattr(ml_dtypes, shape.dtype, shape.dtype))
    tokens, heads, dim = shape.tokens, shape.kv_heads, shape.head_dim

    def normal(*sizes: int) -> Array:
        return rng.standard_normal(sizes, np.float32).astype(dtype)

    q, k, v = (normal(tokens + case.padding, n, dim) for n in (shape.q_heads, heads, heads))
    for array in (q, k, v):
        array[tokens:] = np.nan
    # From a quarter to 4: far from 1, and the stored values stay in the range of float16.
    k_scale, v_scale = (2 ** rng.uniform(-2, 2, heads).astype(np.float32) if case.scales else None for _ in range(2))
    owned = int((-(-shape.kv_lens // shape.page_size)).sum())
    table = shape.page_table(1 + 2 * owned, seed)
    pool = np.full(((1 + 2 * owned) * shape.page_size, 2 * heads, dim), np.nan, dtype)
    expected = pool.copy()
    bounds = np.append(0, np.cumsum(shape.q_lens))
    written, contexts = [], []
    for row, (new, length) in enumerate(zip(shape.q_lens, shape.kv_lens, strict=True)):
        position = np.arange(length)
        slots = table[row, position // shape.page_size].astype(np.int64) * shape.page_size + position % shape.page_size
        fresh = slice(bounds[row], bounds[row + 1])
        halves = []
        for half, (tokens_of_half, scale) in enumerate(((k, k_scale), (v, v_scale))):
            stored = np.concatenate([normal(length - new, heads, dim), _stored(tokens_of_half[fresh], scale, dtype)])
            pool[slots[: length - new], half::2] = stored[: length - new]
            expected[slots, half::2] = stored
            halves.append(stored)
        written.append(slots[length - new :])
        contexts.append((halves[0], halves[1]))
    return Inputs(
        q=q,
        k=k,
        v=v,
        pool=pool,
        page_table=np.pad(table, ((0, 0), (0, case.columns))),
        cu_q_lens=bounds.astype(np.int32),
        kv_lens=shape.kv_lens.astype(np.int32),
        sinks=rng.standard_normal(shape.q_heads).astype(np.float32) if case.sinks else None,
        k_scale=k_scale,
        v_scale=v_scale,
        written=np.concatenate(written),
        contexts=contexts,
        expected_pool=expected,
    )


def _stored(rows: Array, scale: Array | None, dtype: np.dtype[Any]) -> Array:
    """``[n, H, D]`` as the cache stores it."""
    return rows if scale is None else (rows.astype(np.float32) * (np.float32(1) / scale)[:, None]).astype(dtype)


def expected_attention(case: Case, inputs: Inputs) -> Attended:
    """Attention of all tokens; padding tokens have zeros and log-sum-exps of minus infinity."""
    shape = inputs.q.shape
    expected = Attended(np.zeros(shape), np.full(shape[:2], -np.inf), np.zeros(shape))
    for row, (keys, values) in enumerate(inputs.contexts):
        live = slice(inputs.cu_q_lens[row], inputs.cu_q_lens[row + 1])
        if live.start < live.stop:
            attended = attend_row(
                inputs.q[live],
                keys,
                values,
                sm_scale=case.shape.head_dim**-0.5,
                window=case.window,
                soft_cap=case.soft_cap,
                sinks=inputs.sinks,
                k_scale=inputs.k_scale,
                v_scale=inputs.v_scale,
            )
            for whole, part in zip(expected, attended, strict=True):
                whole[live] = part
    return expected


def _each(new: int | None, lengths: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """One sequence per length, with ``new`` new tokens, or all tokens new."""
    return tuple((1, length if new is None else new, length) for length in lengths)


EDGES = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257)
# Decoding, chunks with and without a prefix, a row of padding between them and one at the end.
MIXED = ((2, 1, 300), (1, 70, 70), (1, 0, 0), (1, 33, 161), (1, 1, 64), (1, 129, 500), (1, 0, 0))
RAGGED = _each(None, (1, 7, 63, 64, 65, 127, 128, 129, 200))
CHUNKS = ((1, 64, 128), (1, 100, 433), (1, 256, 1256), (1, 1, 900))


def all_cases() -> list[Case]:
    """The cases, the simplest first, so that the first failure says most."""
    every: dict[str, Any] = {"window": 90, "soft_cap": 20.0, "sinks": True, "scales": True, "lse": True, "padding": 9}
    return [
        Case("decode at tile edges, page 16", Shape(_each(1, EDGES))),
        Case("decode at tile edges, page 64", Shape(_each(1, EDGES), 64)),
        Case("decode, page 8", Shape(_each(1, EDGES), 8)),
        Case("decode, page 128, head_dim 64", Shape(_each(1, EDGES), 128, 32, 8, 64)),
        Case("ragged prefill, page 16", Shape(RAGGED)),
        Case("ragged prefill, page 64, head_dim 64", Shape(RAGGED, 64, 32, 8, 64), padding=5),
        Case("chunks on a prefix, page 16", Shape(CHUNKS), padding=3),
        Case("chunks on a prefix, page 128", Shape(CHUNKS, 128)),
        Case("mixed, padding rows and tokens", Shape(MIXED), padding=37, columns=9),
        Case("mixed, page 8, padding", Shape(MIXED, 8), padding=1),
        Case("mixed, float16", Shape(MIXED, 16, dtype="float16"), padding=7, lse=True),
        Case("decode, GQA 1", Shape(_each(1, EDGES), 16, 8, 8)),
        Case("decode, GQA 8", Shape(_each(1, EDGES), 16, 32, 4)),
        Case("prefill, GQA 1, head_dim 64", Shape(RAGGED, 16, 8, 8, 64)),
        Case("prefill, GQA 8", Shape(RAGGED, 64, 32, 4)),
        Case("log-sum-exp, mixed", Shape(MIXED), lse=True, padding=4),
        Case("window, decode", Shape(_each(1, EDGES)), window=50, lse=True),
        Case("window, mixed, page 64", Shape(MIXED, 64), window=100, padding=2),
        Case("soft cap, mixed", Shape(MIXED), soft_cap=20.0, lse=True),
        Case("sinks, mixed", Shape(MIXED), sinks=True, lse=True, padding=2),
        Case("scales per head, mixed", Shape(MIXED), scales=True, lse=True),
        Case("every option, mixed", Shape(MIXED), **every),
        Case("every option, decode, page 64, head_dim 64", Shape(_each(1, EDGES), 64, 32, 8, 64), **every),
        Case("no live token", Shape(((3, 0, 0), (1, 0, 40))), padding=5, lse=True),
        Case("many rows", Shape(tuple((1, 1, 1 + 17 * i) for i in range(56)), 16, 32, 8), lse=True),
        Case("one row of 32k, decode", Shape(((1, 1, 32_768),))),
        Case("one row of 32k, chunk of 64", Shape(((1, 64, 32_768),), 64)),
    ]


def small_cases() -> list[Case]:
    """Cases that take seconds on a CPU."""
    few = Shape(((1, 1, 20), (1, 9, 9), (1, 0, 0), (1, 5, 30)), 8, 4, 2, 16, "float32")
    every: dict[str, Any] = {"window": 7, "soft_cap": 20.0, "sinks": True, "scales": True, "lse": True, "padding": 3}
    return [Case("mixed", few), Case("every option, bfloat16", Shape(few.rows, 8, 4, 2, 16), **every)]
