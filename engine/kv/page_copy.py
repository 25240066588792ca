"""Copies of whole pages: to the host, back from it, and from page to page of one pool.

The control plane chooses the pages; the bytes are moved unchanged, all layers in one program. Copies are padded to a
few static sizes, so that nothing compiles in steady state.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from engine.distributed.mesh import CONTEXT_AXIS, DATA_AXIS, TENSOR_AXIS, placed, shard_over, spec_over
from engine.errors import ShapeError
from engine.kv.layout import extract_k_from_fused_kv, extract_v_from_fused_kv, refuse_donated, unpad_fused
from engine.kv.narrow import SCALE_DTYPE, Buffer, NarrowKV, codes_of, rows_by_token
from engine.kv.pool import TokenToKVPool
from engine.kv.scatter import scatter_codes
from engine.kv.split import buffer_spec, from_device_order, to_device_order

Int32 = npt.NDArray[np.int32]
PageData = npt.NDArray[Any]
Buffers = tuple[Buffer, ...]

# Pages that a program copies; more go in several calls of the largest, which bounds the memory that a copy takes.
PAGE_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
_PINNED = "pinned_host"
_PAGE_AXIS = 2  # axis of a page's tokens in pages off the device
_NULL_PAGE, _NO_PAGE = 0, -1  # padding of a read, and of a write


def read_pages(pool: TokenToKVPool, pages: npt.ArrayLike, *, replica: int = 0) -> PageData:
    """Copies pages to the host, through pinned memory where the device has it.

    Args:
        pool: the pool, which is not changed.
        pages: ``[n]`` page ids, not the null page.
        replica: index of the pages' replica, along the mesh's axis "data".

    Returns:
        ``[n, layers, page_size, 2H, D]`` in the pool's dtype, without the padding of its storage; may be read-only. Of
        a narrow pool it is bytes, those of a row's scale behind those of its codes (``KVLayout.page_shape``).

    Raises:
        ShapeError: ``pages`` is not a vector of page ids of this pool.
    """
    return start_reading(pool, pages, replica=replica).wait()


@dataclass(frozen=True)
class PageRead:
    """Pages on their way to the host; what the device runs later does not change them.

    Attributes:
        staged: their copies, padded to static sizes.
        shape: ``[n, layers, page_size, 2H, D]``.
        dtype: dtype of pages off the device.
    """

    staged: tuple[jax.Array, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def wait(self) -> PageData:
        """Waits until they are there: ``[n, layers, page_size, 2H, D]``, perhaps read-only."""
        if not self.staged:
            return np.empty(self.shape, self.dtype)
        parts = [np.asarray(part).view(self.dtype) for part in self.staged]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[: self.shape[0]]


def start_reading(pool: TokenToKVPool, pages: npt.ArrayLike, *, replica: int = 0) -> PageRead:
    """As ``read_pages``, without waiting: every copy is under way when it returns."""
    wanted, layout = _check_pages(pool, "pages", pages), pool.layout
    staged = [_to_host_memory(_gather(pool, chunk, replica)) for chunk in _chunks(wanted, _NULL_PAGE)]
    return PageRead(tuple(staged), (wanted.size, pool.layer_num, *layout.page_shape), layout.page_dtype)


def write_pages(pool: TokenToKVPool, pages: npt.ArrayLike, data: PageData, *, replica: int = 0) -> None:
    """Writes pages from the host into the pool, in place; the pool's buffers are rebound, as by its own writes.

    Args:
        pool: the pool.
        pages: ``[n]`` page ids, each once, not the null page.
        data: ``[n, layers, page_size, 2H, D]``, as ``read_pages`` returns it; may be changed after the call.
        replica: index of the pages' replica, along the mesh's axis "data".

    Raises:
        ShapeError: ``pages`` is not a vector of different page ids of this pool, or ``data`` does not fit.
    """
    wanted = _check_unique(_check_pages(pool, "pages", pages), "pages")
    layout = pool.layout
    shape = (wanted.size, pool.layer_num, *layout.page_shape)
    if data.shape != shape or data.dtype != layout.page_dtype:
        raise ShapeError(
            f"data {data.dtype}{list(data.shape)} does not fill {wanted.size} pages of this pool: it must be "
            f"{layout.page_dtype}{list(shape)}, as read_pages returns it"
        )
    done = 0
    for chunk in _chunks(wanted, _NO_PAGE):
        # A fresh copy: a running program may still read its argument when the caller changes ``data``.
        padded = np.zeros((chunk.size, *shape[1:]), _bits_of(pool))
        part = data[done : done + chunk.size]
        padded[: len(part)] = part.view(padded.dtype)
        pool.replace_buffers(_scatter(pool, chunk, padded, replica).buffers)
        done += chunk.size


def copy_pages(pool: TokenToKVPool, sources: npt.ArrayLike, targets: npt.ArrayLike, *, replica: int = 0) -> None:
    """Copies page ``sources[i]`` to page ``targets[i]`` on the device, in place; the pool's buffers are rebound.

    Args:
        pool: the pool.
        sources: ``[n]`` page ids, not the null page.
        targets: ``[n]`` page ids, each once, none of them a source.
        replica: index of the pages' replica, along the mesh's axis "data".

    Raises:
        ShapeError: a vector does not hold page ids of this pool, their lengths differ, or a target is named twice or
            is also a source.
    """
    source, target = _check_pages(pool, "sources", sources), _check_pages(pool, "targets", targets)
    _check_unique(target, "targets")
    if source.size != target.size:
        raise ShapeError(f"cannot copy {source.size} pages to {target.size}: each source needs one target")
    both = np.intersect1d(source, target)
    if both.size:
        raise ShapeError(f"pages {both[:8].tolist()} are both source and target; copy them in two calls")
    for from_pages, to_pages in zip(_chunks(source, _NULL_PAGE), _chunks(target, _NO_PAGE), strict=True):
        pool.replace_buffers(_copy(pool, from_pages, to_pages, replica).buffers)


def _check_pages(pool: TokenToKVPool, name: str, pages: npt.ArrayLike) -> Int32:
    if not isinstance(pool, TokenToKVPool):
        raise ShapeError(f"pages of a {type(pool).__name__} cannot be copied; pass the TokenToKVPool")
    refuse_donated("the pool's first buffer", pool.buffers[0])
    ids = np.asarray(pages)
    last = pool.size // pool.page_size
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ShapeError(f"{name} must be a vector of integer page ids; got {ids.dtype}{list(ids.shape)}")
    wrong = ids[(ids < 1) | (ids > last)]
    if wrong.size:
        raise ShapeError(
            f"{name} {wrong[:8].tolist()} are not pages of this pool, which are 1 to {last}; page 0 is the null page"
        )
    return ids.astype(np.int32)


def _check_unique(pages: Int32, name: str) -> Int32:
    different, counts = np.unique(pages, return_counts=True)
    if different.size != pages.size:
        raise ShapeError(
            f"{name} {different[counts > 1][:8].tolist()} would be written twice in one call; name each once"
        )
    return pages


def _chunks(pages: Int32, padding: int) -> Iterator[Int32]:
    """Cuts pages into runs of the largest bucket and pads the last run to its own."""
    largest = PAGE_BUCKETS[-1]
    for start in range(0, pages.size, largest):
        part = pages[start : start + largest]
        bucket = next(size for size in PAGE_BUCKETS if size >= part.size)
        yield np.concatenate([part, np.full(bucket - part.size, padding, np.int32)])


def _to_host_memory(pages: jax.Array) -> jax.Array:
    """Starts the copy to the host: into pinned memory where the device has its own memory."""
    device = next(iter(pages.devices()))
    if device.platform != "cpu" and any(memory.kind == _PINNED for memory in device.addressable_memories()):
        return _to_pinned(pages)
    pages.copy_to_host_async()
    return pages


def _to_pinned(pages: jax.Array) -> jax.Array:
    pinned: jax.Array = jax.device_put(pages, pages.sharding.with_memory_kind(_PINNED))
    return pinned


def _gather_layer(pool: TokenToKVPool, layer_id: int, pages: jax.Array) -> jax.Array:
    """The bits of ``[n]`` pages of a layer, ``[n, page_size, 2H, D]``; a narrow row's scale follows its codes."""
    layout, buffer = pool.layout, pool.buffers[layer_id]
    by_page = codes_of(buffer).reshape(-1, layout.page_size, layout.rows, layout.lanes)
    to_bits = functools.partial(lax.bitcast_convert_type, new_dtype=_bits_of(pool))

    def take(source: jax.Array) -> jax.Array:
        return unpad_fused(source.at[pages].get(mode="promise_in_bounds"), layout.head_num, layout.width)

    # XLA's CPU compiler may gather bfloat16 by way of float32, which can change a NaN, but not integers. Its TPU
    # compiler gathers any type unchanged, but would copy the whole buffer to view it as integers.
    bits: jax.Array = lax.platform_dependent(
        by_page, cpu=lambda source: take(to_bits(source)), default=lambda source: to_bits(take(source))
    )
    if not isinstance(buffer, NarrowKV):
        return bits
    scales = rows_by_token(buffer.scales.at[pages].get(mode="promise_in_bounds"), layout.page_size)
    scale_bits = lax.bitcast_convert_type(scales[..., : 2 * layout.head_num], jnp.uint8)
    return jnp.concatenate([bits, scale_bits], axis=-1)


def _scatter_layer(pool: TokenToKVPool, layer_id: int, pages: jax.Array, bits: jax.Array) -> None:
    """Writes the bits ``[n, page_size, 2H, D]`` into pages of a layer; pages below 0 are dropped."""
    slots = pages[:, None] * pool.page_size + jnp.arange(pool.page_size, dtype=jnp.int32)[None, :]
    slots = jnp.where(pages[:, None] < 0, -1, slots).reshape(-1)
    fused, layout = bits.reshape(slots.size, *bits.shape[2:]), pool.layout
    # Halved as integers: XLA's CPU compiler slices narrow floats by way of wider ones.
    codes = fused[..., : layout.width]
    k, v = (
        lax.bitcast_convert_type(half, layout.element_dtype)
        for half in (extract_k_from_fused_kv(codes), extract_v_from_fused_kv(codes))
    )
    buffer = pool.buffers[layer_id]
    if isinstance(buffer, NarrowKV):
        scales = lax.bitcast_convert_type(fused[..., layout.width :], SCALE_DTYPE)
        pool.rebind(layer_id, scatter_codes(buffer, slots, k, v, scales))
    else:
        pool.set_kv_buffer(layer_id, slots, k, v)


def _bits_of(pool: TokenToKVPool) -> np.dtype[Any]:
    """Dtype of the unsigned integers in which pages are moved, so that no bit pattern is changed as a number."""
    return np.dtype(f"uint{8 * pool.layout.page_dtype.itemsize}")


@jax.jit
def _gather(pool: TokenToKVPool, pages: jax.Array, replica: int = 0) -> jax.Array:
    def gather(buffers: Buffers, pages: jax.Array, replica: jax.Array) -> jax.Array:
        part = pool.local_part(buffers)
        bits = jnp.stack([_gather_layer(part, layer_id, pages) for layer_id in range(part.layer_num)], axis=1)
        if pool.replicas == 1:
            return bits
        summed: jax.Array = lax.psum(jnp.where(lax.axis_index(DATA_AXIS) == replica, bits, 0), DATA_AXIS)
        return summed

    if pool.mesh is None:
        return gather(pool.buffers, pages, jnp.int32(0))
    buffers, whole = buffer_spec(pool.mesh), PartitionSpec()
    split = shard_over(
        gather, pool.mesh, in_specs=(buffers, whole, whole), out_specs=_pages_spec(pool.mesh), check_vma=False
    )
    # Every device gets all of it, so that every process can read it.
    gathered = placed(split(pool.buffers, pages, jnp.int32(replica)), pool.mesh, whole)
    return from_device_order(gathered, pool.mesh, axis=_PAGE_AXIS)


@functools.partial(jax.jit, donate_argnums=0)
def _scatter(pool: TokenToKVPool, pages: jax.Array, data: jax.Array, replica: int = 0) -> TokenToKVPool:
    def scatter(buffers: Buffers, pages: jax.Array, data: jax.Array, replica: jax.Array) -> Buffers:
        part = pool.local_part(buffers)
        for layer_id in range(part.layer_num):
            _scatter_layer(part, layer_id, _of_replica(pool, pages, replica), data[:, layer_id])
        return part.buffers

    if pool.mesh is None:
        return pool.replace_buffers(scatter(pool.buffers, pages, data, jnp.int32(0)))
    buffers, whole = buffer_spec(pool.mesh), PartitionSpec()
    split = shard_over(
        scatter,
        pool.mesh,
        in_specs=(buffers, whole, _pages_spec(pool.mesh), whole),
        out_specs=buffers,
        check_vma=False,
    )
    in_parts = to_device_order(data, pool.mesh, axis=_PAGE_AXIS)
    return pool.replace_buffers(split(pool.buffers, pages, in_parts, jnp.int32(replica)))


@functools.partial(jax.jit, donate_argnums=0)
def _copy(pool: TokenToKVPool, sources: jax.Array, targets: jax.Array, replica: int = 0) -> TokenToKVPool:
    def copy(buffers: Buffers, sources: jax.Array, targets: jax.Array, replica: jax.Array) -> Buffers:
        part = pool.local_part(buffers)
        for layer_id in range(part.layer_num):
            bits = _gather_layer(part, layer_id, sources)
            _scatter_layer(part, layer_id, _of_replica(pool, targets, replica), bits)
        return part.buffers

    if pool.mesh is None:
        return pool.replace_buffers(copy(pool.buffers, sources, targets, jnp.int32(0)))
    buffers, whole = buffer_spec(pool.mesh), PartitionSpec()
    split = shard_over(copy, pool.mesh, in_specs=(buffers, whole, whole, whole), out_specs=buffers, check_vma=False)
    return pool.replace_buffers(split(pool.buffers, sources, targets, jnp.int32(replica)))


def _of_replica(pool: TokenToKVPool, pages: jax.Array, replica: jax.Array) -> jax.Array:
    """Within ``shard_map``: the pages that are written, on the replica's devices; none on others."""
    if pool.replicas == 1:
        return pages
    return jnp.where(lax.axis_index(DATA_AXIS) == replica, pages, _NO_PAGE)


def _pages_spec(mesh: Mesh) -> PartitionSpec:
    """How ``[n, layers, page_size, 2H, D]`` is split: each device has its part of every page."""
    return spec_over(mesh, None, None, CONTEXT_AXIS, TENSOR_AXIS, None)
