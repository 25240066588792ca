"""The attention of all layers of a model over a pool whose buffers groups of layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh

from engine.attention import AttentionMetadata, FlashAttentionBackend, MeshAttention
from engine.attention.window_table import WindowTable
from engine.distributed.mesh import CONTEXT_AXIS, axis_size
from engine.layer_groups import LayerGroups
from engine.models.model_config import ModelConfig

Backend: TypeAlias = FlashAttentionBackend | MeshAttention


@dataclass(frozen=True)
class LayerAttention:
    """How and where each layer attends; hashable, holds no array.

    Attributes:
        groups: the groups of the layers, and the buffer of each layer.
        backends: of each layer, in the order of the model; layers of equal options share one.
    """

    groups: LayerGroups
    backends: tuple[Backend, ...]

    @classmethod
    def of(cls, backends: Sequence[FlashAttentionBackend], mesh: Mesh | None = None) -> LayerAttention:
        """Groups layers by their windows; over a mesh where there is one.

        Args:
            backends: of each layer, with all its heads.
            mesh: the mesh.

        Raises:
            ConfigError: there are no layers, or the mesh does not divide heads, page or a window.
        """
        groups = LayerGroups.of([backend.sliding_window for backend in backends])
        shared: dict[FlashAttentionBackend, Backend] = {
            backend: backend if mesh is None else MeshAttention.over(backend, mesh) for backend in set(backends)
        }
        return cls(groups, tuple(shared[backend] for backend in backends))

    def tables(self, page_size: int, table_pages: int, step_tokens: int) -> tuple[WindowTable, ...]:
        """Which columns of its page table each group sees in a step of ``step_tokens`` new tokens of a replica."""
        backend = self.backends[0]
        devices = axis_size(backend.mesh, CONTEXT_AXIS) if isinstance(backend, MeshAttention) else 1
        make = partial(WindowTable.of, step_tokens=step_tokens, devices=devices)
        return tuple(make(window, page_size, table_pages) for window in self.groups.windows)

    def over(self, buffers: Sequence[Any], metadata: Sequence[AttentionMetadata]) -> StepAttention:
        """Attention over the buffers of a pool, for one step.

        Args:
            buffers: ``groups.num_buffers`` of them.
            metadata: of each group.
        """
        prepared: list[Any] = list(metadata)
        for place, backend in zip(self.groups.places, self.backends, strict=True):
            if place.buffer == 0 and isinstance(backend, MeshAttention):
                prepared[place.group] = backend.prepare(metadata[place.group])
        return StepAttention(self, list(buffers), prepared)


@dataclass
class StepAttention:
    """What a model calls in one step for each layer, in order.

    Attributes:
        layers: attention of the layers.
        buffers: the pool's buffers, replaced by what a layer has written.
        prepared: of each group, the step's metadata as its backends take it.
    """

    layers: LayerAttention
    buffers: list[Any]
    prepared: list[Any] = field(repr=False)

    def __call__(
        self, layer_id: int, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None = None
    ) -> jax.Array:
        """Writes the new keys and values of a layer and attends; arguments as of ``FlashAttentionBackend``."""
        group, buffer = self.layers.groups.places[layer_id]
        attend: Any = self.layers.backends[layer_id]
        out: jax.Array
        out, self.buffers[buffer] = attend(q, k, v, self.buffers[buffer], self.prepared[group], sinks=sinks)
        return out


def layer_backends(model: ModelConfig, *, page_size: int, impl: str) -> list[FlashAttentionBackend]:
    """The attention of each layer of a model, on one device; ``impl`` is that of ``FlashAttentionBackend``."""
    return [
        FlashAttentionBackend(
            page_size=page_size,
            num_q_heads=model.num_attention_heads,
            num_kv_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            sm_scale=layer.sm_scale,
            sliding_window=layer.window,
            soft_cap=layer.soft_cap,
            impl=impl,
        )
        for layer in model.layer_attention
    ]
