"""Attention over a mesh: every device attends with the heads it holds, through the same call as on one device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from engine.attention.backend import AttentionMetadata, FlashAttentionBackend
from engine.config import require_split
from engine.kv.split import buffer_spec, new_tokens_spec
from engine.parallel import DATA_AXIS, TENSOR_AXIS, axis_size, spec_over


@dataclass(frozen=True)
class MeshAttention:
    """A ``FlashAttentionBackend`` whose heads are split over the mesh's axis "tensor", and its sequences over "data".

    Attributes:
        local: the backend of one device, with its share of the heads.
        mesh: the mesh.
    """

    local: FlashAttentionBackend
    mesh: Mesh

    @classmethod
    def over(cls, backend: FlashAttentionBackend, mesh: Mesh) -> MeshAttention:
        """Splits a backend; raises ConfigError where the mesh does not divide its heads."""
        parts = axis_size(mesh, TENSOR_AXIS)
        heads = {"num_q_heads": backend.num_q_heads, "num_kv_heads": backend.num_kv_heads}
        require_split(TENSOR_AXIS, parts, heads)
        local = dataclasses.replace(
            backend, num_q_heads=backend.num_q_heads // parts, num_kv_heads=backend.num_kv_heads // parts
        )
        return cls(local, mesh)

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        fused_kv: jax.Array,
        metadata: AttentionMetadata,
        *,
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """As ``FlashAttentionBackend``, over arrays that are split as the pool is.

        With R replicas every axis of tokens and sequences is R times as long, one replica after the other; lengths,
        page ids and slots are each replica's own, from 0.
        """
        new, buffer, rows = new_tokens_spec(self.mesh), buffer_spec(self.mesh), spec_over(self.mesh, DATA_AXIS)
        sink = spec_over(self.mesh, TENSOR_AXIS)
        split = jax.shard_map(
            self._attend,
            mesh=self.mesh,
            in_specs=(new, new, new, buffer, rows, sink),
            out_specs=(new, buffer),
            check_vma=False,  # kernels do not say over which axes their results vary
        )
        result: tuple[jax.Array, jax.Array] = split(q, k, v, fused_kv, metadata, sinks)
        return result

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        fused_kv: jax.Array,
        metadata: AttentionMetadata,
        sinks: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        out, written = self.local(q, k, v, fused_kv, metadata, sinks=sinks)
        return out, written
