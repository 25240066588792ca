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
    """Places over a mesh, or nothing where ``mesh`` is None."""

    mesh: Mesh | None = None

    @property
    def is_split(self) -> bool:
        """Whether there are several devices."""
        return self.mesh is not None

    @property
    def is_shared(self) -> bool:
        """Whether other processes hold a part."""
        return self.mesh is not None and self.mesh.is_multi_process

    @property
    def replicated(self) -> NamedSharding | None:
        """The sharding of what every device, and so every process, holds whole."""
        return None if self.mesh is None else NamedSharding(self.mesh, REPLICATED)

    def each_replica(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The traced function over arrays of all replicas, one after the other on their first axis.

        It sees those of one replica at a time, as it would those of the only one, and whole over the other axes.
        """
        if self.mesh is None:
            return function
        spec = PartitionSpec(DATA_AXIS)
        return jax.shard_map(function, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)

    @property
    def by_replica(self) -> NamedSharding | None:
        """The sharding of what each replica has a part of, whole on every one of its devices."""
        return None if self.mesh is None else named(self.mesh, DATA_AXIS)

    def on_device(self, array: npt.NDArray[Any]) -> Any:
        """A host array that is the same in every process, by replica; as it is where there is one device."""
        if self.by_replica is None:
            return array
        return jax.make_array_from_callback(array.shape, self.by_replica, array.__getitem__)

    def like(self, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """The int32 array that ``on_device`` makes, for compiling ahead."""
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=self.by_replica)

    def hidden(self, activations: jax.Array) -> jax.Array:
        """``[tokens, hidden]``: whole on every device of a tensor group, each replica's own tokens."""
        if self.mesh is None:
            return activations
        placed: jax.Array = jax.lax.with_sharding_constraint(activations, named(self.mesh, DATA_AXIS, None))
        return placed

    def logits(self, logits: jax.Array) -> jax.Array:
        """``[rows, vocab]``: split as the weights they come from; else XLA would gather those to make these whole."""
        if self.mesh is None or logits.shape[1] % axis_size(self.mesh, TENSOR_AXIS):
            return logits
        placed: jax.Array = jax.lax.with_sharding_constraint(logits, named(self.mesh, DATA_AXIS, TENSOR_AXIS))
        return placed

    def whole(self, tree: Any) -> Any:
        """Arrays that the host will read: gathered to every device, and so to every process."""
        return self._constrained(tree, self.replicated)

    def own(self, tree: Any) -> Any:
        """Arrays of which each replica keeps its part."""
        return self._constrained(tree, self.by_replica)

    @staticmethod
    def _constrained(tree: Any, sharding: NamedSharding | None) -> Any:
        if sharding is None:
            return tree
        return jax.tree.map(lambda array: jax.lax.with_sharding_constraint(array, sharding), tree)
