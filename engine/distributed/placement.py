"""Where a step's arrays lie: on one device as they come, or over a mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.distributed.mesh import DATA_AXIS, REPLICATED, TENSOR_AXIS, axis_size, named


@dataclass(frozen=True)
class Placement:
    """Places arrays over a mesh; leaves them as they are where ``mesh`` is None."""

    mesh: Mesh | None = None

    @property
    def is_split(self) -> bool:
        """Whether there are several devices."""
        return self.mesh is not None

    @property
    def is_shared(self) -> bool:
        """Whether other processes hold a part of the mesh."""
        return self.mesh is not None and self.mesh.is_multi_process

    @property
    def replicated(self) -> NamedSharding | None:
        """The sharding of an array that every device, and so every process, holds whole."""
        return None if self.mesh is None else NamedSharding(self.mesh, REPLICATED)

    def each_replica(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The traced function, applied to each replica's part of arrays whose first axis has all replicas in order.

        The function sees one replica's arrays, as if it were the only one, whole over the other mesh axes.
        """
        if self.mesh is None:
            return function
        spec = PartitionSpec(DATA_AXIS)
        return jax.shard_map(function, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)

    @property
    def by_replica(self) -> NamedSharding | None:
        """The sharding of an array of which each replica has a part, whole on every device of the replica."""
        return None if self.mesh is None else named(self.mesh, DATA_AXIS)

    def on_device(self, array: npt.NDArray[Any]) -> Any:
        """A host array that is the same in every process, split by replica; the array itself without a mesh."""
        if self.by_replica is None:
            return array
        return jax.make_array_from_callback(array.shape, self.by_replica, array.__getitem__)

    def like(self, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """The shape and sharding of the int32 array that ``on_device`` makes, for compiling ahead."""
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=self.by_replica)

    def hidden(self, activations: jax.Array) -> jax.Array:
        """``[tokens, hidden]`` split by replica, whole on every device of a tensor group."""
        if self.mesh is None:
            return activations
        placed: jax.Array = jax.lax.with_sharding_constraint(activations, named(self.mesh, DATA_AXIS, None))
        return placed

    def logits(self, logits: jax.Array) -> jax.Array:
        """``[rows, vocab]`` split as the output weights are; else XLA would gather those weights."""
        if self.mesh is None or logits.shape[1] % axis_size(self.mesh, TENSOR_AXIS):
            return logits
        placed: jax.Array = jax.lax.with_sharding_constraint(logits, named(self.mesh, DATA_AXIS, TENSOR_AXIS))
        return placed

    def whole(self, tree: Any) -> Any:
        """Arrays that the host will read, gathered to every device, and so to every process."""
        return self._constrained(tree, self.replicated)

    def own(self, tree: Any) -> Any:
        """Arrays of which each replica keeps its own part."""
        return self._constrained(tree, self.by_replica)

    @staticmethod
    def _constrained(tree: Any, sharding: NamedSharding | None) -> Any:
        if sharding is None:
            return tree
        return jax.tree.map(lambda array: jax.lax.with_sharding_constraint(array, sharding), tree)
