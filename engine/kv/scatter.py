"""Writing new keys and values into their slots of a fused buffer, in place where the buffer is donated.

Four programs do it, and they agree bit for bit: XLA's scatter; on the CPU a native kernel, because around its own
scatter XLA's CPU compiler may convert a whole 8- or 16-bit buffer to a wider type and back (docs/adr/0001); on a TPU a
kernel of one DMA per row (docs/adr/0002); and on a Hopper GPU a kernel of two bulk copies per token. A narrow buffer's
codes are written by the same programs, after their quantisation, and its scales by XLA's scatter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from engine.distributed.mesh import explicit_sharding, shard_over, varying_axes
from engine.errors import ShapeError
from engine.kv.gpu_target import may_be_split, not_hopper
from engine.kv.layout import bits_of, check_storage, merge_kv, pad_fused, refuse_donated, stores_pairs, to_stored
from engine.kv.narrow import AnyBuffer, Buffer, NarrowKV, codes_of, kind_in, kind_of, quantise, rotate, row_width
from engine.kv.split import split_of_heads
from engine.kv.tpu_view import view_is_free
from engine.native import library


def set_kv_buffer(fused: AnyBuffer, loc: jax.Array, k: jax.Array, v: jax.Array) -> AnyBuffer:
    """Writes token ``t``'s keys and values into slot ``loc[t]``; pure, and in place where ``fused`` is donated.

    Args:
        fused: ``[S, 2H, D]``, or padded storage ``[S, 2H', D']``, whose padding is written as zeros; or a narrow
            buffer, for which the tokens are quantised (``engine.kv.narrow.quantise``).
        loc: ``[T]`` slots of any integer type; those below 0 or not below S are dropped; of equal ones the last wins.
        k: ``[T, H, D]``, cast to the buffer's dtype; what is finite saturates.
        v: as ``k``.

    Returns:
        The buffer, written.

    Raises:
        ShapeError: the arrays do not fit together, or k and v are floating and the buffer is not, or the reverse of a
            narrow one.
    """
    parts = fused if isinstance(fused, NarrowKV) else (fused,)
    for name, array in (*(("fused", part) for part in parts), ("loc", loc), ("k", k), ("v", v)):
        if not isinstance(array, jax.Array | np.ndarray):
            raise ShapeError(f"{name} is a {type(array).__name__}, not an array; pass a NumPy or JAX array")
        refuse_donated(name, array)
    fused, loc, k, v = jax.tree.map(jnp.asarray, (fused, slots_within(loc, _slots_of(fused)), k, v))
    _check(fused, loc, k, v)
    if not isinstance(fused, NarrowKV):
        k, v = (to_stored(half, fused.dtype) for half in (k, v))
    written: AnyBuffer = _scatter(fused, _clean(loc, _slots_of(fused)), k, v)
    return written


def _slots_of(fused: Buffer) -> int:
    codes = codes_of(fused)
    return codes.shape[0] if codes.ndim else 0


def slots_within(loc: Any, slots: int) -> Any:
    """Slots in a NumPy array as int32, -1 for each that is out of range; a JAX array is returned as it is.

    jax would cut 64 bits to 32, which could bring a slot from out of range into it.
    """
    if not isinstance(loc, np.ndarray) or loc.dtype.kind not in "iu":
        return loc
    inside = (loc >= 0) & (loc < slots)
    return np.where(inside, loc, 0).astype(np.int32) - (~inside).astype(np.int32)


def _check(fused: Buffer, loc: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if k.ndim != 3 or k.shape != v.shape or k.dtype != v.dtype:
        raise ShapeError(
            f"k {k.dtype}{list(k.shape)} and v {v.dtype}{list(v.shape)} must both be [tokens, heads, head_dim], of one "
            "dtype; reshape or cast one of them"
        )
    if loc.shape != k.shape[:1] or not jnp.issubdtype(loc.dtype, jnp.integer):
        raise ShapeError(
            f"loc {loc.dtype}{list(loc.shape)} must hold one integer slot for each of the {k.shape[0]} tokens of k; "
            "use -1 for a token that is not to be written"
        )
    if isinstance(fused, NarrowKV):
        if not jnp.issubdtype(k.dtype, jnp.floating):
            raise ShapeError(f"k and v of {k.dtype} cannot be quantised for a narrow buffer: pass floating ones")
        check_storage(fused, *k.shape[1:])
        return
    if bits_of(fused.dtype) < 8:
        raise ShapeError(f"the buffer's {fused.dtype} is packed below a byte, which no pool stores; use int8 or fp8")
    if jnp.issubdtype(k.dtype, jnp.floating) and not jnp.issubdtype(fused.dtype, jnp.floating):
        raise ShapeError(f"k and v of {k.dtype} cannot be cast to a buffer of {fused.dtype}; quantise them first")
    check_storage(fused, *k.shape[1:])


def _clean(loc: jax.Array, slots: int) -> jax.Array:
    """Slots as int32, -1 for each that is out of range."""
    if loc.dtype.itemsize < 4:  # too narrow to be compared with `slots`
        loc = loc.astype(jnp.int32)
    return jnp.where((loc < 0) | (loc >= slots), -1, loc).astype(jnp.int32)


@functools.partial(jax.jit, inline=True)
def _scatter(fused: Buffer, loc: jax.Array, k: jax.Array, v: jax.Array) -> Buffer:
    if (sharding := explicit_sharding(codes_of(fused)) or explicit_sharding(k)) is not None:
        by_head = PartitionSpec(None, split_of_heads("fused", fused))
        specs = (by_head, PartitionSpec(), by_head, by_head)
        over_heads = shard_over(_scatter, sharding.mesh, in_specs=specs, out_specs=by_head, check_vma=False)
        in_parts: Buffer = over_heads(fused, loc, k, v)
        return in_parts
    if not isinstance(fused, NarrowKV):
        return scatter_stored(fused, loc, k, v)
    choices = {"cpu": quantise_native} if jax.default_backend() == "cpu" and library.available() else {}
    k = rotate(k) if kind_of(fused.codes.dtype).rotated else k
    written: NarrowKV = lax.platform_dependent(fused, loc, k, v, **choices, default=quantise_xla)
    return written


def quantise_xla(fused: NarrowKV, loc: jax.Array, k: jax.Array, v: jax.Array) -> NarrowKV:
    """Quantises k, which comes rotated where the kind asks for it, and v, and writes them."""
    kind = kind_of(fused.codes.dtype)
    (k_codes, k_scales), (v_codes, v_scales) = quantise(k, kind), quantise(v, kind)
    return scatter_codes(fused, loc, k_codes, v_codes, merge_kv(k_scales[..., None], v_scales[..., None])[..., 0])


def scatter_codes(fused: NarrowKV, loc: jax.Array, k: jax.Array, v: jax.Array, scales: jax.Array) -> NarrowKV:
    """Writes what is quantised already.

    Args:
        fused: the buffer.
        loc: ``[T]`` int32 in [-1, S).
        k: ``[T, H, W]`` codes.
        v: as ``k``.
        scales: ``[T, 2H]`` float32, in the order of the fused rows.
    """
    pages, page_scales = fused.scales.shape
    page_size = fused.page_size
    by_row = fused.scales.reshape(pages, -1, page_size)
    scales = jnp.pad(scales, ((0, 0), (0, by_row.shape[1] - scales.shape[1])))
    slots = _unique(loc, fused.codes.shape[0])
    # Slots beyond the buffer are in pages beyond it.
    written = by_row.at[slots // page_size, :, slots % page_size].set(scales, mode="drop", unique_indices=True)
    return NarrowKV(scatter_stored(fused.codes, loc, k, v), written.reshape(pages, page_scales))


def scatter_stored(fused: jax.Array, loc: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Writes rows that have the buffer's dtype; ``loc`` is int32 in [-1, S)."""
    # The program is chosen when the call is lowered, so a call that is traced on this CPU for a TPU gets the TPU's.
    choices = {}
    if jax.default_backend() == "cpu" and library.available():
        choices["cpu"] = scatter_native
    _, rows, lanes = fused.shape
    if view_is_free(rows, lanes, fused.dtype) and not stores_pairs(rows, lanes, *k.shape[1:]):
        choices["tpu"] = _scatter_dma
    # Mosaic GPU refuses to write in place what is typed as varying over a mesh: within shard_map, pass check_vma=False.
    if not varying_axes(fused, loc, k, v) and _bulk_copies_fit(fused, k):
        choices["cuda"] = _scatter_bulk
    written: jax.Array = lax.platform_dependent(fused, loc, k, v, **choices, default=scatter_xla)
    return written


def _scatter_dma(fused: jax.Array, loc: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Calls the TPU's kernel, whose copies are all in flight at once."""
    # Only here: Pallas takes long to import, and no other platform needs it.
    from engine.kv.scatter_tpu import scatter_tpu

    return _scatter_distinct(scatter_tpu, fused, loc, k, v)


def _bulk_copies_fit(fused: jax.Array, k: jax.Array) -> bool:
    """Whether the call is lowered for a Hopper GPU whose kernel takes such rows; it takes no padded storage."""
    _, heads, head_dim = k.shape
    # XLA cannot split a kernel: it would gather a cache that is split, where its own scatter stays in place.
    if not_hopper() is not None or may_be_split() or fused.shape[1:] != (2 * heads, head_dim):
        return False
    from engine.kv.scatter_gpu import rows_are_copied

    return rows_are_copied(heads, head_dim, fused.dtype)


def _scatter_bulk(fused: jax.Array, loc: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Calls the Hopper GPU's kernel, whose blocks run in any order."""
    from engine.kv.scatter_gpu import scatter_gpu

    return _scatter_distinct(scatter_gpu, fused, loc, k, v)


def _scatter_distinct(
    kernel: Callable[..., jax.Array], fused: jax.Array, loc: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """Calls a kernel that may write in any order, with only the last of equal slots."""
    axes = varying_axes(fused, loc, k, v)
    missing = [axes - varying_axes(operand) for operand in (fused, loc, k, v)]
    fused, loc, k, v = (
        lax.pcast(operand, tuple(more), to="varying") if more else operand
        for operand, more in zip((fused, loc, k, v), missing, strict=True)
    )
    slots, tokens = last_of_equal(loc)
    # Under vmap one after the other: the copies of a batched kernel would share their semaphores.
    written: jax.Array = jax.custom_batching.sequential_vmap(kernel)(fused, slots, tokens, k, v)
    return written


def quantise_native(fused: NarrowKV, loc: jax.Array, k: jax.Array, v: jax.Array) -> NarrowKV:
    """Calls the native kernel that quantises and writes in one pass; the bits of ``quantise_xla``, CPU only."""
    slots, rows, lanes = fused.codes.shape
    width = row_width(k.shape[2], kind_in(fused))
    if stores_pairs(rows, lanes, k.shape[1], width):
        rows, lanes = 2 * rows, lanes // 2
    codes = fused.codes.reshape(slots, rows, lanes)
    results = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (codes, fused.scales))
    call = jax.ffi.ffi_call(library.QUANTISE, results, input_output_aliases={0: 0, 1: 1}, vmap_method="sequential")
    written = call(codes, fused.scales, loc, k, v)
    axes = varying_axes(*fused, loc, k, v)
    codes, scales = (lax.pcast(array, tuple(axes), to="varying") if axes else array for array in written)
    return NarrowKV(codes.reshape(fused.codes.shape), scales)


def scatter_native(fused: jax.Array, loc: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Calls the native kernel, which writes in order; arguments as ``scatter_xla``, CPU only."""
    slots, rows, lanes = fused.shape
    if stores_pairs(rows, lanes, *k.shape[1:]):
        return scatter_native(fused.reshape(slots, 2 * rows, lanes // 2), loc, k, v).reshape(fused.shape)
    result = jax.ShapeDtypeStruct(fused.shape, fused.dtype)
    call = jax.ffi.ffi_call(library.SCATTER, result, input_output_aliases={0: 0}, vmap_method="sequential")
    written: jax.Array = call(fused, loc, k, v)
    # Within shard_map the result must be typed as varying over the mesh axes over which the operands vary.
    axes = varying_axes(fused, loc, k, v)
    return lax.pcast(written, tuple(axes), to="varying") if axes else written


def scatter_xla(fused: jax.Array, loc: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Scatters through XLA; ``loc`` is int32 in [-1, S), k and v have the buffer's dtype."""
    slots, rows, lanes = fused.shape
    updates = pad_fused(merge_kv(k, v), rows, lanes)
    return fused.at[_unique(loc, slots)].set(updates, mode="drop", unique_indices=True)


def _unique(loc: jax.Array, slots: int) -> jax.Array:
    """Replaces -1 and all but the last of equal slots by different indices beyond the buffer.

    XLA does not define which of equal indices wins, so none may be equal.
    """
    kept, order = last_of_equal(loc)
    beyond = slots + jnp.arange(loc.shape[0], dtype=jnp.int32)
    return beyond.at[order].set(jnp.where(kept >= 0, kept, beyond[order]), unique_indices=True)


def last_of_equal(loc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Slots ``[T]`` in ascending order, -1 for all but the last of equal ones, and the token of each; int32."""
    order = jnp.argsort(loc, stable=True).astype(jnp.int32)
    ranked = loc[order]
    last = jnp.append(ranked[1:] != ranked[:-1], True)[: loc.shape[0]]
    return jnp.where(last, ranked, -1), order
