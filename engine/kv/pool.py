"""The pool: one fused buffer per layer on the device, addressed by slot."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.typing import DTypeLike

from engine.config import MAX_SLOTS
from engine.distributed.mesh import CONTEXT_AXIS, DATA_AXIS, TENSOR_AXIS, axis_size, placed, shard_over, spec_over
from engine.errors import ConfigError, ShapeError
from engine.kv.layout import (
    KVLayout,
    extract_k_from_fused_kv,
    extract_v_from_fused_kv,
    refuse_donated,
    require_count,
    unpad_fused,
)
from engine.kv.narrow import KINDS, Buffer, NarrowKV, codes_of, dequantise, is_rotated, kind_of, rotate, rows_by_token
from engine.kv.room import room_for
from engine.kv.scatter import set_kv_buffer, slots_within
from engine.kv.split import buffer_spec, in_slot_order, local_slots, new_tokens_spec, split_layout


@jax.tree_util.register_pytree_with_keys_class
class TokenToKVPool:
    """Keys and values of all tokens, ``[size + page_size, 2H, D]`` per layer, heads interleaved.

    A pytree of its buffers: a jitted function that takes it donated returns the pool with the same memory. The methods
    that write donate and rebind its buffers, which deletes arrays that were taken from it before.

    Attributes:
        buffers: one per layer, ``layout.buffer_like(replicas * (size + page_size))``: an array, or a ``NarrowKV`` of
            codes and scales for int8 and int4; page 0 is the null page.
        size: usable token slots of each replica.
        layout: descriptor of the bytes: page size, heads, dtype and padding.
        mesh: mesh over which the buffers are split (``engine.kv.split``), or None.
    """

    buffers: tuple[Any, ...]
    size: int
    layout: KVLayout
    mesh: Mesh | None

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: DTypeLike,
        head_num: int,
        head_dim: int,
        layer_num: int,
        mesh: Mesh | None = None,
        *,
        platform: str | None = None,
    ) -> None:
        """Makes a pool of zeros on the device.

        Args:
            size: usable token slots of each replica, a positive multiple of ``page_size``.
            page_size: tokens per page, a multiple of the mesh's axis "context".
            dtype: dtype of keys and values as stored; int8 and int4 have a scale for each token and row (``NarrowKV``).
            head_num: KV heads, H.
            head_dim: elements per head, D.
            layer_num: layers, at least 1.
            mesh: splits the heads over its axis "tensor", the tokens of a page over "context", and holds a replica for
                each place on "data"; None keeps all on the default device.
            platform: platform whose padding is stored, as in ``jax.Device.platform``; None is that of the devices.

        Raises:
            ConfigError: a value is out of range, heads or pages do not split evenly, or the memory of the devices (for
                CPUs, of the host) is too small.
        """
        if platform is None:
            platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        layout = KVLayout.create(
            head_num=head_num, head_dim=head_dim, dtype=dtype, page_size=page_size, platform=platform
        )
        _check_size(size, page_size, layer_num)
        self.size, self.layout, self.mesh = size, _over_mesh(layout, mesh, platform), mesh
        devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
        what = f"a pool of {size:,} tokens in {layer_num} layers"
        bytes_each = layer_num * self.replicas * (size + page_size) * self.layout.bytes_per_token // len(devices)
        with room_for(what, bytes_each, devices):
            self.buffers = jax.block_until_ready(self._fresh_buffers(layer_num))  # else a failure would come later

    @classmethod
    def from_buffers(
        cls,
        buffers: Sequence[Buffer],
        page_size: int,
        head_num: int,
        head_dim: int,
        mesh: Mesh | None = None,
        *,
        platform: str | None = None,
    ) -> Self:
        """Makes a pool of existing buffers without a copy; it owns them from then on, and donates them as it writes.

        Args:
            buffers: one per layer, ``[replicas * (size + page_size), 2H', D']`` or ``NarrowKV`` as a pool makes them,
                of one dtype.
            page_size: tokens per page; the first page of each replica is its null page.
            head_num: KV heads, H.
            head_dim: elements per head, D.
            mesh: mesh that they are split over as ``engine.kv.split`` says, or None.
            platform: platform whose padding they have, as in ``jax.Device.platform``; None is that of the devices.

        Raises:
            ConfigError: a value is out of range, or the buffers do not hold a whole number of pages, at least two.
            ShapeError: a buffer is not an array, was donated, or is not as the pool would make it.
        """
        given = list(buffers)
        for index, buffer in enumerate(given):
            stored = codes_of(buffer)
            if not isinstance(stored, jax.Array) or stored.ndim != 3:
                raise ShapeError(
                    f"buffer {index} is {_described(stored)}; it must be a JAX array [slots, 2 * heads, D], or a "
                    "NarrowKV whose codes are"
                )
        require_count("the number of buffers", len(given))
        refuse_donated("buffer 0", given[0])
        stored = codes_of(given[0])
        if platform is None:
            platform = next(iter(stored.devices())).platform
        layout = KVLayout.create(
            head_num=head_num, head_dim=head_dim, dtype=_dtype_of(given[0]), page_size=page_size, platform=platform
        )
        size = stored.shape[0] // axis_size(mesh, DATA_AXIS) - page_size
        _check_size(size, page_size, len(given))
        pool = cls.tree_unflatten((size, _over_mesh(layout, mesh, platform), mesh), (tuple(given),))
        return pool.replace_buffers(given)

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.layout.page_size

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of keys and values as stored."""
        return self.layout.dtype

    @property
    def layer_num(self) -> int:
        """Number of layers."""
        return len(self.buffers)

    @property
    def replicas(self) -> int:
        """Number of replicas, of ``size`` slots each: the size of the mesh's axis "data"."""
        return axis_size(self.mesh, DATA_AXIS)

    @property
    def buffer_shape(self) -> tuple[int, int, int]:
        """Shape of each layer's buffer or codes, over all devices: ``[replicas * (size + page_size), 2H', D']``."""
        return self.layout.buffer_shape(self.replicas * (self.size + self.page_size))

    @property
    def buffer_like(self) -> Any:
        """Shapes and dtypes of each layer's buffer, over all devices, as of ``KVLayout.buffer_like``."""
        layout = replace(self.layout, page_size=self.page_size // axis_size(self.mesh, CONTEXT_AXIS))
        return layout.buffer_like(self.replicas * (self.size + self.page_size))

    @property
    def kv_size_bytes(self) -> int:
        """Bytes of all buffers on all devices, null pages and padding included."""
        return self.layer_num * self.replicas * (self.size + self.page_size) * self.layout.bytes_per_token

    @property
    def device_bytes(self) -> int:
        """Bytes of all buffers on each device."""
        return self.kv_size_bytes // (1 if self.mesh is None else self.mesh.size)

    def get_fused_kv_buffer(self, layer_id: int) -> Any:
        """The buffer of a layer as it is stored, as ``buffer_like`` says."""
        self._check_layer(layer_id)
        refuse_donated(f"the buffer of layer {layer_id}", self.buffers[layer_id])
        return self.buffers[layer_id]

    def get_kv_buffer(self, layer_id: int) -> tuple[jax.Array, jax.Array]:
        """Copies of a layer's keys and values by slot, ``[size + page_size, H, D]`` each, without padding.

        Of a narrow pool they are what the codes stand for, in float32.
        """
        half: tuple[jax.Array, jax.Array] = _halves(self.get_fused_kv_buffer(layer_id), self.layout, self.mesh)
        return half

    def set_kv_buffer(self, layer_id: int, loc: jax.Array, k: jax.Array, v: jax.Array) -> None:
        """Writes tokens into a layer in place, as ``engine.kv.scatter.set_kv_buffer`` does.

        Args:
            layer_id: index of the layer, from 0.
            loc: ``[T]`` slots; negative ones and those out of range are dropped, of equal ones the last wins. Each of
                several replicas has an equal share of T, and its own slots.
            k: ``[T, H, D]``, cast to the pool's dtype, or quantised.
            v: as ``k``.

        Raises:
            ConfigError: there is no such layer.
            ShapeError: the arrays do not fit the pool.
        """
        fused, heads = self.get_fused_kv_buffer(layer_id), (self.layout.head_num, self.layout.head_dim)
        if not isinstance(k, jax.Array | np.ndarray) or k.shape[1:] != heads:
            raise ShapeError(
                f"k is {_described(k)}; it must be [tokens, {heads[0]}, {heads[1]}], as this pool was made"
            )
        self.rebind(layer_id, _write(fused, slots_within(loc, self.size + self.page_size), k, v, self.mesh))

    def rebind(self, layer_id: int, written: Buffer) -> None:
        """Takes a layer's buffer, as a write within this room returned it."""
        self.buffers = (*self.buffers[:layer_id], written, *self.buffers[layer_id + 1 :])

    def local_part(self, buffers: tuple[Buffer, ...]) -> Self:
        """Within ``shard_map`` over the pool's mesh: one device's part, as a pool; without a mesh: the pool itself.

        Args:
            buffers: the device's parts of the buffers.
        """
        tp, cp = axis_size(self.mesh, TENSOR_AXIS), axis_size(self.mesh, CONTEXT_AXIS)
        layout = replace(
            self.layout,
            head_num=self.layout.head_num // tp,
            rows=self.layout.rows // tp,
            page_size=self.page_size // cp,
        )
        return self.tree_unflatten((self.size // cp, layout, None), (buffers,))

    def replace_buffers(self, buffers: Sequence[Buffer]) -> Self:
        """Takes the buffers that a step has written as its own.

        Args:
            buffers: one per layer, of the pool's shape and dtype.

        Returns:
            The pool itself.

        Raises:
            ShapeError: their number, a shape or a dtype is not the pool's.
        """
        like = self.buffer_like
        if len(buffers) != self.layer_num:
            raise ShapeError(f"{len(buffers)} buffers for a pool of {self.layer_num} layers: give one for each layer")
        for layer_id, buffer in enumerate(buffers):
            refuse_donated(f"buffer {layer_id}", buffer)
            if _described(buffer) != _described(like):
                raise ShapeError(
                    f"buffer {layer_id} is {_described(buffer)}, the pool's are {_described(like)}; give what the step "
                    "returned for this pool"
                )
        self.buffers = tuple(buffers)
        return self

    def renew(self) -> None:
        """Makes new buffers, of zeros, after the old ones were lost: donated to a program that failed."""
        for buffer in jax.tree.leaves(self.buffers):
            buffer.delete()  # a failed program's result may keep its memory
        self.buffers = self._fresh_buffers(self.layer_num)

    def _fresh_buffers(self, count: int) -> tuple[Buffer, ...]:
        return tuple(_zeros(self.buffer_like, self.mesh)() for _ in range(count))

    def _check_layer(self, layer_id: int) -> None:
        if isinstance(layer_id, bool) or not isinstance(layer_id, int | np.integer):
            raise ConfigError(f"layer_id={layer_id!r} must be a whole number, from 0")
        if not 0 <= layer_id < self.layer_num:
            raise ConfigError(f"layer_id={layer_id} is not in a pool of {self.layer_num} layers; count from 0")

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], tuple[int, KVLayout, Mesh | None]]:
        """The buffers as children; everything else is static."""
        return ((jax.tree_util.GetAttrKey("buffers"), self.buffers),), (self.size, self.layout, self.mesh)

    @classmethod
    def tree_unflatten(cls, static: tuple[int, KVLayout, Mesh | None], children: tuple[Any]) -> Self:
        """A pool with what jax puts in the place of the buffers."""
        pool = cls.__new__(cls)
        pool.size, pool.layout, pool.mesh = static
        (pool.buffers,) = children
        return pool


def _over_mesh(layout: KVLayout, mesh: Mesh | None, platform: str) -> KVLayout:
    """The layout of buffers that are split over a mesh."""
    if mesh is None:
        return layout
    if TENSOR_AXIS not in mesh.shape:
        raise ConfigError(f"the mesh has the axes {tuple(mesh.shape)}; the heads need one called {TENSOR_AXIS!r}")
    return split_layout(layout, tp=mesh.shape[TENSOR_AXIS], cp=axis_size(mesh, CONTEXT_AXIS), platform=platform)


def _described(buffer: Any) -> str:
    if isinstance(buffer, NarrowKV):
        return " with scales ".join(map(_described, buffer))
    is_array = isinstance(buffer, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    return f"{buffer.dtype}{list(buffer.shape)}" if is_array else f"a {type(buffer).__name__}"


def _dtype_of(buffer: Buffer) -> Any:
    """The pool's dtype by its buffer."""
    codes = codes_of(buffer)
    if not isinstance(buffer, NarrowKV):
        if codes.dtype.name in KINDS:
            raise ShapeError(f"a buffer of {codes.dtype} alone has no scales; pass a NarrowKV of codes and scales")
        return codes.dtype
    kind = kind_of(codes.dtype)
    return next(name for name, of_name in KINDS.items() if of_name is kind)


def _check_size(size: int, page_size: int, layer_num: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise ConfigError(f"size={size!r} must be a whole number of tokens")
    require_count("layer_num", layer_num)
    if size < page_size or size % page_size:
        below = size // page_size * page_size
        usable = f"{below} or {below + page_size}" if below > 0 else f"{page_size} or more"
        raise ConfigError(f"size={size} tokens must be a positive multiple of page_size={page_size}; use {usable}")
    if size + page_size > MAX_SLOTS:
        raise ConfigError(
            f"size={size} tokens and the null page make more than {MAX_SLOTS:,} slots, which int32 can number; lower it"
        )


@functools.cache
def _zeros(like: Any, mesh: Mesh | None) -> Callable[[], Buffer]:
    """The program that makes zeros of some shapes and dtypes."""

    def make() -> Any:
        return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), like)

    if mesh is None:
        return jax.jit(make)
    if AxisType.Explicit in mesh.axis_types:  # there only the result tells which devices the program is for
        return jax.jit(make, out_shardings=NamedSharding(mesh, buffer_spec(mesh)))
    # Constrained, so that the sharding is spelled as XLA spells that of the steps' results.
    return jax.jit(lambda: placed(make(), mesh, buffer_spec(mesh)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _halves(fused: Buffer, layout: KVLayout, mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a buffer, by slot."""
    by_head = fused if mesh is None else placed(fused, mesh, spec_over(mesh, None, TENSOR_AXIS))
    rows = unpad_fused(codes_of(by_head), layout.head_num, layout.width)
    if isinstance(by_head, NarrowKV):
        scales = rows_by_token(by_head.scales, layout.page_size // axis_size(mesh, CONTEXT_AXIS))
        rows = dequantise(rows, scales.reshape(rows.shape[0], -1)[:, : 2 * layout.head_num])
    stored = in_slot_order(rows, mesh)
    keys, values = extract_k_from_fused_kv(stored), extract_v_from_fused_kv(stored)
    return (rotate(keys) if is_rotated(fused) else keys), values


def _write(fused: Buffer, loc: jax.Array, k: jax.Array, v: jax.Array, mesh: Mesh | None) -> Buffer:
    # The CPU backend may alias a NumPy argument: the caller could then change it under the running write.
    loc, k, v = (jnp.array(array) if isinstance(array, np.ndarray) else array for array in (loc, k, v))
    # Within a trace the outermost jit donates; only a call outside any trace needs a jit here.
    write = _scatter_over if isinstance(codes_of(fused), jax.core.Tracer) else _scatter_donated
    written: Buffer = write(fused, loc, k, v, mesh)
    return written


def _scatter_over(fused: Buffer, loc: jax.Array, k: jax.Array, v: jax.Array, mesh: Mesh | None) -> Buffer:
    if mesh is None:
        return set_kv_buffer(fused, loc, k, v)

    # Each device writes its own heads: otherwise XLA would gather the buffer for a kernel that it cannot split.
    def write(fused: Buffer, loc: jax.Array, k: jax.Array, v: jax.Array) -> Buffer:
        return set_kv_buffer(fused, local_slots(loc, axis_size(mesh, CONTEXT_AXIS)), k, v)

    buffer, new = buffer_spec(mesh), new_tokens_spec(mesh)
    slots = spec_over(mesh, DATA_AXIS)
    # Unchecked, because the kernel for Hopper GPUs is not taken in a checked one (engine/kv/scatter.py).
    split = shard_over(write, mesh, in_specs=(buffer, slots, new, new), out_specs=buffer, check_vma=False)
    written: Buffer = split(fused, loc, k, v)
    return written


_scatter_donated = jax.jit(_scatter_over, static_argnums=4, donate_argnums=0)
