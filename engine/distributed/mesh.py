"""The mesh: what its axes mean and how it is made.

Three axes, always in this order, so that the devices of one tensor group are neighbours:

    data      replicas of attention, each with its own requests, page table and pages
    context   the tokens of every page, dealt out to the devices in turn
    tensor    KV heads with their query heads, and the columns or rows of the weights
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from engine.devices import why_no_device
from engine.errors import ConfigError

DATA_AXIS, CONTEXT_AXIS, TENSOR_AXIS = "data", "context", "tensor"
AXES = (DATA_AXIS, CONTEXT_AXIS, TENSOR_AXIS)
REPLICATED = PartitionSpec()


def make_mesh(*, tp: int = 1, dp: int = 1, cp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """Makes the mesh of ``dp * cp * tp`` devices.

    Args:
        tp: devices that divide the heads among them.
        dp: replicas of attention.
        cp: devices that divide the tokens of each page among them.
        devices: the devices to choose from; None is all devices of all processes.

    Returns:
        The mesh with ``AXES``, or None where it would be one device.

    Raises:
        ConfigError: there are too few devices, jax has none, or a process would be left without a device of the mesh.
    """
    if devices is None and (reason := why_no_device()):
        raise ConfigError(reason)
    available = list(jax.devices() if devices is None else devices)
    wanted = tp * dp * cp
    if wanted > len(available):
        raise ConfigError(
            f"tp={tp} x dp={dp} x cp={cp} needs {wanted} devices and there are {len(available)} of platform "
            f"{available[0].platform}; lower one of them (on a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted} makes virtual ones)"
        )
    processes = len({device.process_index for device in available})
    if processes > 1 and wanted != len(available):
        raise ConfigError(
            f"tp={tp} x dp={dp} x cp={cp} are {wanted} devices, and {processes} processes have {len(available)}: each "
            "process must hold a part; choose factors whose product is the number of devices"
        )
    if wanted == 1:
        return None
    # jax.make_mesh would refuse 8 devices of a slice of 4 x 4, which are not whole rows of it.
    grid = create_device_mesh((dp, cp, tp), available[:wanted], allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def axis_size(mesh: Mesh | None, axis: str) -> int:
    """Devices along ``axis``; 1 where there is no mesh, or no such axis."""
    return 1 if mesh is None else mesh.shape.get(axis, 1)


def named(mesh: Mesh, *entries: str | tuple[str, ...] | None) -> NamedSharding:
    """The sharding ``PartitionSpec(*entries)`` over ``mesh``, without the axes that it does not have."""
    return NamedSharding(mesh, spec_over(mesh, *entries))


def spec_over(mesh: Mesh, *entries: str | tuple[str, ...] | None) -> PartitionSpec:
    """``PartitionSpec(*entries)`` without the axes that ``mesh`` does not have."""
    kept = []
    for entry in entries:
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        present = tuple(axis for axis in axes if axis in mesh.shape)
        kept.append(present if len(present) > 1 else present[0] if present else None)
    return PartitionSpec(*kept)


def explicit_sharding(array: Any) -> NamedSharding | None:
    """The sharding that an array's type has over Explicit mesh axes; None where no axis splits it."""
    sharding = jax.typeof(array).sharding
    return sharding if any(entry is not None for entry in sharding.spec) else None


def shard_over(
    function: Callable[..., Any], mesh: Mesh | AbstractMesh, *, in_specs: Any, out_specs: Any, check_vma: bool = True
) -> Callable[..., Any]:
    """``jax.shard_map``, but its arguments may come in any sharding.

    Over Auto axes jax allows that itself. Over Explicit axes, which ``jax.make_mesh`` makes by default, the sharding is
    part of an array's type, so each argument is first brought to the sharding of its ``in_specs`` entry.
    """
    split = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    if AxisType.Explicit not in mesh.axis_types:
        return split
    specs = (in_specs,) if isinstance(in_specs, PartitionSpec) else in_specs

    def call(*operands: Any) -> Any:
        return split(*placed(operands, mesh, specs))

    return call


def varying_axes(*operands: jax.Array) -> frozenset[str]:
    """The mesh axes over which any operand varies, within ``shard_map``."""
    return frozenset[str]().union(*(jax.typeof(operand).manual_axis_type.varying for operand in operands))


def placed(tree: Any, mesh: Mesh | AbstractMesh, specs: Any) -> Any:
    """Traced arrays, each in the sharding that is named for it, whatever the kind of the mesh's axes.

    Args:
        tree: a tree of arrays.
        mesh: the mesh.
        specs: one PartitionSpec for all arrays, or a tree of PartitionSpecs.
    """
    place = jax.sharding.reshard if AxisType.Explicit in mesh.axis_types else jax.lax.with_sharding_constraint

    def place_all(spec: PartitionSpec, part: Any) -> Any:
        return jax.tree.map(lambda array: place(array, NamedSharding(mesh, spec)), part)

    return jax.tree.map(place_all, specs, tree, is_leaf=lambda spec: isinstance(spec, PartitionSpec))
