"""How a pool lies over a mesh: heads over "tensor", replicas over "data", the slots of a replica over "context".

Along "context" slots are dealt out in turn: slot ``s`` lies on device ``s % cp``, as its slot ``s // cp``. So every
device has ``page_size / cp`` tokens of every page, under the same page id: one page table serves all devices, and the
control plane need not know. Along "data" every replica counts its slots from 0, its null page included.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from engine.config import require_split
from engine.distributed.mesh import CONTEXT_AXIS, DATA_AXIS, TENSOR_AXIS, axis_size, explicit_sharding, spec_over
from engine.errors import BackendUnsupported, ConfigError
from engine.kv.layout import KVLayout
from engine.kv.narrow import Buffer, codes_of


def split_layout(layout: KVLayout, *, tp: int, cp: int, platform: str) -> KVLayout:
    """The layout whose rows and pages split evenly.

    Args:
        layout: layout of the whole pool.
        tp: number of devices that share the heads.
        cp: number of devices that share the tokens of a page.
        platform: platform whose padding is stored.

    Raises:
        ConfigError: the heads or a page do not divide evenly, or there would be padding within the buffer.
    """
    require_split(CONTEXT_AXIS, cp, {"page_size": layout.page_size})
    if layout.head_num % tp:
        raise ConfigError(
            f"{layout.head_num} KV heads do not split over {tp} devices: each must hold whole K and V pairs; use a "
            f"{TENSOR_AXIS!r} axis that divides {layout.head_num}"
        )
    part = KVLayout.create(
        head_num=layout.head_num // tp,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        page_size=layout.page_size,
        platform=platform,
    )
    if tp > 1 and part.rows != (part.head_num if part.has_pairs else 2 * part.head_num):
        raise ConfigError(
            f"{part.head_num} KV heads of {layout.dtype} per device are {2 * part.head_num} rows, stored as "
            f"{part.rows} on {platform}, and padding inside a split buffer is not supported; use a smaller "
            f"{TENSOR_AXIS!r} axis"
        )
    return dataclasses.replace(layout, rows=tp * part.rows)


def buffer_spec(mesh: Mesh) -> PartitionSpec:
    """How a fused buffer ``[slots, 2H, D]`` and a narrow one's scales are split; K and V of a head stay together."""
    return spec_over(mesh, (DATA_AXIS, CONTEXT_AXIS), TENSOR_AXIS)


def new_tokens_spec(mesh: Mesh) -> PartitionSpec:
    """How q, k, v and out ``[tokens, heads, head_dim]`` are split."""
    return spec_over(mesh, DATA_AXIS, TENSOR_AXIS, None)


def split_of_heads(name: str, fused: Buffer) -> str | tuple[str, ...] | None:
    """The axes of an Explicit mesh by which a fused buffer ``[slots, 2H, D]`` has its heads split; None: not split.

    Raises:
        BackendUnsupported: it is split along another axis as well.
    """
    sharding = explicit_sharding(codes_of(fused))
    slots, axes, lanes = (None, None, None) if sharding is None else sharding.spec
    if slots is not None or lanes is not None:
        raise BackendUnsupported(
            f"{name} is split as {PartitionSpec(slots, axes, lanes)}: a call alone takes a buffer that is split by its "
            "heads; for split slots use a TokenToKVPool and MeshAttention over the mesh"
        )
    found: str | tuple[str, ...] | None = axes
    return found


def local_slots(loc: jax.Array, parts: int) -> jax.Array:
    """Within ``shard_map``, of ``parts`` devices along "context": a replica's slots as this device's, else -1.

    -1 stands for the slots of other devices and for negative ones.
    """
    if parts == 1:
        return loc
    mine = (loc >= 0) & (loc % parts == lax.axis_index(CONTEXT_AXIS))
    return jnp.where(mine, loc // parts, -1)


def in_slot_order(fused: jax.Array, mesh: Mesh | None) -> jax.Array:
    """A buffer's rows in the order of slots, one replica after the other; a copy where "context" splits it."""
    by_replica = fused.reshape(axis_size(mesh, DATA_AXIS), -1, *fused.shape[1:])
    return from_device_order(by_replica, mesh, axis=1).reshape(fused.shape)


def from_device_order(array: jax.Array, mesh: Mesh | None, *, axis: int) -> jax.Array:
    """Slots along ``axis`` in the order of slots, from the order of devices."""
    return _regrouped(array, axis, axis_size(mesh, CONTEXT_AXIS), -1)


def to_device_order(array: jax.Array, mesh: Mesh | None, *, axis: int) -> jax.Array:
    """Slots along ``axis`` in the order of devices, from the order of slots."""
    return _regrouped(array, axis, -1, axis_size(mesh, CONTEXT_AXIS))


def _regrouped(array: jax.Array, axis: int, outer: int, inner: int) -> jax.Array:
    if 1 in (outer, inner):
        return array
    shape = array.shape
    return array.reshape(*shape[:axis], outer, inner, *shape[axis + 1 :]).swapaxes(axis, axis + 1).reshape(shape)
