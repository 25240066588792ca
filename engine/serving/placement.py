"""Where a step's arrays lie: on one device as they come, or over a mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding

from engine.parallel import DATA_AXIS, REPLICATED, TENSOR_AXIS, axis_size, named


@dataclass(frozen=True)
class Placement:
    """Places over a mesh, or nothing where ``mesh`` is None."""

    mesh: Mesh | None = None

    @property
    def is_shared(self) -> bool:
        """Whether other processes hold a part."""
        return self.mesh is not None and self.mesh.is_multi_process

    @property
    def replicated(self) -> NamedSharding | None:
        """The sharding of what every device, and so every process, holds whole."""
        return None if self.mesh is None else NamedSharding(self.mesh, REPLICATED)

    def on_device(self, array: npt.NDArray[Any]) -> Any:
        """A host array that is the same in every process, for all devices; as it is where there is one."""
        if self.replicated is None:
            return array
        return jax.make_array_from_callback(array.shape, self.replicated, array.__getitem__)

    def like(self, array: Any) -> jax.ShapeDtypeStruct:
        """The shape that ``on_device`` of such an array has, for compiling ahead."""
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self.replicated)

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
        """Arrays that the host will read: gathered to every device."""
        if self.replicated is None:
            return tree
        return jax.tree.map(lambda array: jax.lax.with_sharding_constraint(array, self.replicated), tree)
