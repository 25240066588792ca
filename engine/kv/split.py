"""Where a slot lies over a mesh: heads over "tensor", replicas over "data", the slots of a replica over "context".

Along "context" slots are dealt out in turn: slot ``s`` lies on device ``s % cp``, at its slot ``s // cp``. A page is
thus on every device, with the same id and ``page_size / cp`` tokens on each, so one page table serves them all and the
books need not know. Along "data" every replica has slots of its own from 0, its null page included.
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


def split_layout(layout: KVLayout, *, tp: int, cp: int, platform: str) -> KVLayout:
    """The layout whose rows and pages split evenly.

    Args:
        layout: of the pool as a whole.
        tp: devices that share the heads.
        cp: devices that share the tokens of a page.
        platform: whose padding to store with.

    Raises:
        ConfigError: a K would part from its V, a page would not divide, or there would be padding within the buffer.
    """
    require_split(CONTEXT_AXIS, cp, {"page_size": layout.page_size})
    if layout.head_num % tp:
        raise ConfigError(
            f"{layout.head_num} KV heads do not split over {tp} devices: each must hold whole K and V pairs; use a "
            f"{TENSOR_AXIS!r} axis that divides {layout.head_num}"
        )
    share = KVLayout.create(
        head_num=layout.head_num // tp,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        page_size=layout.page_size,
        platform=platform,
    )
    if tp > 1 and share.rows != 2 * share.head_num:
        raise ConfigError(
            f"{share.head_num} KV heads of {layout.dtype} a device are {2 * share.head_num} rows, stored as "
            f"{share.rows} on {platform}, and padding inside a split buffer is not supported; use a smaller "
            f"{TENSOR_AXIS!r} axis"
        )
    return dataclasses.replace(layout, rows=tp * share.rows)


def buffer_spec(mesh: Mesh) -> PartitionSpec:
    """How a fused buffer ``[slots, 2H, D]`` is split: a K never parts from its V."""
    return spec_over(mesh, (DATA_AXIS, CONTEXT_AXIS), TENSOR_AXIS, None)


def new_tokens_spec(mesh: Mesh) -> PartitionSpec:
    """How q, k, v and out ``[tokens, heads, head_dim]`` are split."""
    return spec_over(mesh, DATA_AXIS, TENSOR_AXIS, None)


def split_of_heads(name: str, fused: jax.Array) -> str | tuple[str, ...] | None:
    """The axes of an Explicit mesh by which a fused buffer ``[slots, 2H, D]`` has its heads split; None: not split.

    Raises:
        BackendUnsupported: it is split otherwise too.
    """
    sharding = explicit_sharding(fused)
    slots, axes, lanes = (None, None, None) if sharding is None else sharding.spec
    if slots is not None or lanes is not None:
        raise BackendUnsupported(
            f"{name} is split as {PartitionSpec(slots, axes, lanes)}: a call alone takes a buffer that is split by its "
            "heads; for split slots use a TokenToKVPool and MeshAttention over the mesh"
        )
    found: str | tuple[str, ...] | None = axes
    return found


def local_slots(loc: jax.Array, mesh: Mesh) -> jax.Array:
    """Within ``shard_map``: a replica's slots as this device's, -1 for what others hold and for what is negative."""
    parts = axis_size(mesh, CONTEXT_AXIS)
    if parts == 1:
        return loc
    mine = (loc >= 0) & (loc % parts == lax.axis_index(CONTEXT_AXIS))
    return jnp.where(mine, loc // parts, -1)


def in_slot_order(fused: jax.Array, mesh: Mesh | None) -> jax.Array:
    """A buffer's rows as the books count them, the replicas one after the other; a copy where "context" splits it."""
    by_replica = fused.reshape(axis_size(mesh, DATA_AXIS), -1, *fused.shape[1:])
    return from_device_order(by_replica, mesh, axis=1).reshape(fused.shape)


def from_device_order(array: jax.Array, mesh: Mesh | None, *, axis: int) -> jax.Array:
    """Slots along ``axis`` in their own order, from that of the devices that they were dealt out to."""
    return _regrouped(array, axis, axis_size(mesh, CONTEXT_AXIS), -1)


def to_device_order(array: jax.Array, mesh: Mesh | None, *, axis: int) -> jax.Array:
    """Slots along ``axis`` device by device, from their own order."""
    return _regrouped(array, axis, -1, axis_size(mesh, CONTEXT_AXIS))


def _regrouped(array: jax.Array, axis: int, outer: int, inner: int) -> jax.Array:
    if 1 in (outer, inner):
        return array
    shape = array.shape
    return array.reshape(*shape[:axis], outer, inner, *shape[axis + 1 :]).swapaxes(axis, axis + 1).reshape(shape)
