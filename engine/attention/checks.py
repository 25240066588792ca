"""Refuses a malformed attention call before anything is written.

Shapes and dtypes are always checked, contents only where the arrays are concrete (not being traced).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, ShapeError
from engine.kv.layout import check_storage, refuse_donated
from engine.kv.narrow import Buffer, NarrowKV, codes_of

Array = Any  # a NumPy or JAX array, traced or not
IntArray = npt.NDArray[np.integer[Any]]


def check_options(
    *, page_size: int, sm_scale: float | Array | None, sliding_window: int | None, soft_cap: float | None
) -> None:
    """Checks the options that hold for a whole layer.

    Raises:
        ConfigError: an option is out of its range.
    """
    for name, count in (("page_size", page_size), ("sliding_window", sliding_window)):
        if count is None and name == "sliding_window":
            continue
        if not isinstance(count, int | np.integer) or isinstance(count, bool) or not 1 <= count < 2**31:
            raise ConfigError(f"{name}={count!r} must be a whole number of tokens, at least 1 and below 2**31")
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ConfigError(f"soft_cap={soft_cap!r} must be finite and above 0; pass None for no cap")
    if isinstance(sm_scale, jax.core.Tracer):
        if sm_scale.shape or not jnp.issubdtype(sm_scale.dtype, jnp.floating):
            raise ConfigError(f"sm_scale is traced as {sm_scale.dtype}{sm_scale.shape}; it must be one floating number")
    elif sm_scale is not None and not (np.ndim(sm_scale) == 0 and math.isfinite(sm_scale)):
        raise ConfigError(f"sm_scale={sm_scale!r} must be one finite number; pass None for head_dim ** -0.5")


def check_arrays(**arrays: Array) -> None:
    """Checks that each named argument is an array that can still be read.

    Raises:
        ShapeError: it is something else, e.g. a list or a whole pool, or an array that was donated.
    """
    for name, array in arrays.items():
        if not isinstance(array, jax.Array | np.ndarray):
            is_pool = hasattr(array, "get_fused_kv_buffer")
            remedy = "a layer's buffer, pool.get_fused_kv_buffer(layer_id)" if is_pool else "a NumPy or JAX array"
            raise ShapeError(f"{name} is a {type(array).__name__}, not an array; pass {remedy}")
        refuse_donated(name, array)


def check_tensors(q: Array, k: Array, v: Array, fused_kv: Buffer, sinks: Array | None, page_size: int) -> None:
    """Checks shapes and dtypes of the tensors; the pool's storage may be padded in rows and lanes.

    Args:
        q: ``[T, Hq, D]``.
        k: ``[T, H, D]``.
        v: ``[T, H, D]``.
        fused_kv: ``[S, 2H', D']``, or a narrow buffer.
        sinks: ``[Hq]`` or None.
        page_size: tokens per page.

    Raises:
        ShapeError: shapes or dtypes disagree.
    """
    stored, is_narrow = codes_of(fused_kv), isinstance(fused_kv, NarrowKV)
    for name, array in (("q", q), ("k", k), ("v", v), ("fused_kv", stored)):
        if array.ndim != 3 or 0 in array.shape:
            raise ShapeError(f"{name} has shape {array.shape}; it must have three axes, none of them empty")
        if not _is_float(array) and not (is_narrow and array is stored):
            raise ShapeError(f"{name} has dtype {array.dtype}; attention takes floating-point arrays")
    if k.shape != v.shape or k.dtype != v.dtype:
        raise ShapeError(f"k is {k.dtype}{k.shape} and v is {v.dtype}{v.shape}; they must be alike")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.dtype != k.dtype:
        raise ShapeError(
            f"q is {q.dtype}{q.shape} and k is {k.dtype}{k.shape}; they must agree in tokens, head_dim and dtype"
        )
    if q.shape[1] % k.shape[1]:
        raise ShapeError(f"{q.shape[1]} query heads cannot share {k.shape[1]} KV heads; use a multiple of {k.shape[1]}")
    check_storage(fused_kv, k.shape[1], k.shape[2])
    if stored.shape[0] % page_size:
        raise ShapeError(f"fused_kv has {stored.shape[0]} slots, which page_size={page_size} does not divide")
    if isinstance(fused_kv, NarrowKV) and fused_kv.page_size != page_size:
        raise ShapeError(
            f"the scales of fused_kv are those of pages of {fused_kv.page_size} tokens, and page_size={page_size}; "
            "pass the page size of the pool"
        )
    if sinks is not None and (sinks.shape != (q.shape[1],) or not _is_float(sinks)):
        raise ShapeError(f"sinks is {sinks.dtype}{sinks.shape}; it must be floating-point, ({q.shape[1]},)")


def check_scales(num_kv_heads: int, **scales: Array | None) -> None:
    """Checks each named scale of a quantised cache, ``[H]`` float32 or None; contents where it is concrete.

    Raises:
        ShapeError: a scale has another shape or dtype, or is not finite and above 0.
    """
    for name, scale in scales.items():
        if scale is None:
            continue
        if scale.shape != (num_kv_heads,) or scale.dtype != np.float32:
            raise ShapeError(
                f"{name} is {scale.dtype}{scale.shape}; it must be float32({num_kv_heads},), one per KV head"
            )
        if isinstance(scale, jax.core.Tracer):
            continue
        values = np.asarray(scale)
        if (head := _first(~(np.isfinite(values) & (values > 0)))) is not None:
            raise ShapeError(
                f"{name}[{head}] is {values[head]}; what is stored is divided by it, so it must be finite and above 0"
            )


def check_metadata_shapes(page_table: Array, cu_q_lens: Array, kv_lens: Array) -> None:
    """Checks shapes and dtypes of what describes the step.

    Args:
        page_table: ``[B, P]`` int32.
        cu_q_lens: ``[B + 1]`` int32.
        kv_lens: ``[B]`` int32.

    Raises:
        ShapeError: shapes disagree or a dtype is not int32.
    """
    for name, array in (("page_table", page_table), ("cu_q_lens", cu_q_lens), ("kv_lens", kv_lens)):
        if array.dtype != np.int32:
            raise ShapeError(f"{name} has dtype {array.dtype}; it must be int32")
    if page_table.ndim != 2 or 0 in page_table.shape:
        raise ShapeError(f"page_table has shape {page_table.shape}; it must be [B, P] with at least one row and column")
    rows = page_table.shape[0]
    if kv_lens.shape != (rows,) or cu_q_lens.shape != (rows + 1,):
        raise ShapeError(
            f"page_table has {rows} rows, kv_lens shape {kv_lens.shape} and cu_q_lens shape {cu_q_lens.shape}; "
            f"for {rows} rows they must be ({rows},) and ({rows + 1},)"
        )


def check_token_arrays(num_tokens: int, **arrays: Array) -> None:
    """Checks that each named array is int32 ``[T]``; raises ShapeError."""
    for name, array in arrays.items():
        if array.shape != (num_tokens,) or array.dtype != np.int32:
            raise ShapeError(
                f"{name} is {array.dtype}{array.shape}; for {num_tokens} tokens it must be int32({num_tokens},)"
            )


def check_lengths(cu_q_lens: IntArray, kv_lens: IntArray, *, num_tokens: int, row_tokens: int) -> None:
    """Checks that the lengths of a step's sequences fit each other, the tokens and the page table.

    Args:
        cu_q_lens: ``[B + 1]`` running sum of new tokens.
        kv_lens: ``[B]`` cached plus new tokens.
        num_tokens: T, rows of q.
        row_tokens: tokens that one page-table row can hold.

    Raises:
        ShapeError: naming the first sequence that is wrong.
    """
    q_lens = np.diff(cu_q_lens)
    if cu_q_lens[0] != 0:
        raise ShapeError(f"cu_q_lens[0] is {cu_q_lens[0]}; the running sum of new tokens must start from 0")
    if (row := _first(q_lens < 0)) is not None:
        raise ShapeError(
            f"cu_q_lens falls from {cu_q_lens[row]} to {cu_q_lens[row + 1]} at row {row}; it must not fall"
        )
    if cu_q_lens[-1] > num_tokens:
        raise ShapeError(
            f"cu_q_lens ends at {cu_q_lens[-1]} but q has {num_tokens} tokens; it must end at {num_tokens} or less"
        )
    if (row := _first(kv_lens < q_lens)) is not None:
        raise ShapeError(
            f"sequence {row} has kv_lens {kv_lens[row]} but {q_lens[row]} new tokens; "
            "kv_lens counts cached plus new tokens, so it cannot be less"
        )
    if (row := _first((kv_lens > row_tokens) & (q_lens > 0))) is not None:
        raise ShapeError(
            f"sequence {row} has {kv_lens[row]} tokens but its page-table row holds {row_tokens}; "
            "give the page table more columns"
        )


def check_pages(
    page_table: IntArray,
    cu_q_lens: IntArray,
    kv_lens: IntArray,
    *,
    page_size: int,
    num_pages: int,
    sliding_window: int | None,
) -> None:
    """Checks the page ids that a step reads or writes, once its lengths have been checked.

    Args:
        page_table: ``[B, P]`` page ids.
        cu_q_lens: ``[B + 1]`` running sum of new tokens.
        kv_lens: ``[B]`` cached plus new tokens.
        page_size: tokens per page.
        num_pages: pages of the pool, the null page included.
        sliding_window: tokens that a query sees; pages that lie wholly before them are not needed. None sees all.

    Raises:
        ShapeError: a needed page is the null page or out of range, or a page that a sequence writes is used twice.
    """
    q_lens = np.diff(cu_q_lens)
    first_new = kv_lens - q_lens
    first_seen = np.zeros_like(kv_lens) if sliding_window is None else np.maximum(0, first_new - sliding_window + 1)
    column = np.arange(page_table.shape[1])[None, :]
    last_page = -(-kv_lens // page_size)
    alive = (q_lens > 0)[:, None] & (column < last_page[:, None])
    used = alive & (column >= (first_seen // page_size)[:, None])
    if (at := _first(used & ((page_table < 1) | (page_table >= num_pages)))) is not None:
        row, col = divmod(at, page_table.shape[1])
        raise ShapeError(
            f"page_table[{row}, {col}] is {page_table[row, col]} but sequence {row} needs that page for its "
            f"{kv_lens[row]} tokens; page ids run from 1 to {num_pages - 1} (page 0 is the null page)"
        )
    written = alive & (column >= (first_new // page_size)[:, None])
    uses = np.bincount(page_table[used], minlength=num_pages)
    if (at := _first(written & (uses[np.clip(page_table, 0, num_pages - 1)] > 1))) is not None:
        row, col = divmod(at, page_table.shape[1])
        raise ShapeError(
            f"page {page_table[row, col]} at page_table[{row}, {col}] is written by sequence {row} and used "
            f"{uses[page_table[row, col]]} times in this step; a page that is written belongs to one place only"
        )


def _is_float(array: Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _first(wrong: npt.NDArray[np.bool_]) -> int | None:
    """Flat index of the first True, or None."""
    return int(np.argmax(wrong)) if wrong.any() else None
