"""Attention over a mesh: every device attends with the heads and tokens it holds, through the same call as on one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from engine.attention.context_parallel import ContextRows, attend_part, rows_of_device
from engine.attention.layer import FlashAttentionBackend
from engine.attention.metadata import AttentionMetadata
from engine.attention.options import HeadArrays
from engine.config import require_split
from engine.distributed.mesh import CONTEXT_AXIS, DATA_AXIS, TENSOR_AXIS, axis_size, shard_over, spec_over
from engine.kv.narrow import Buffer
from engine.kv.split import buffer_spec, new_tokens_spec


@dataclass(frozen=True)
class MeshAttention:
    """A ``FlashAttentionBackend`` over a mesh.

    Heads are split over the axis "tensor", the tokens of every page over "context", and sequences over "data".

    Attributes:
        local: the backend of one device: its part of the heads, of a page, and of the window.
        mesh: the mesh.
    """

    local: FlashAttentionBackend
    mesh: Mesh

    @classmethod
    def over(cls, backend: FlashAttentionBackend, mesh: Mesh) -> MeshAttention:
        """Splits a backend; raises ConfigError where the mesh does not divide its heads, page or window."""
        tensor, context = axis_size(mesh, TENSOR_AXIS), axis_size(mesh, CONTEXT_AXIS)
        heads = {"num_q_heads": backend.num_q_heads, "num_kv_heads": backend.num_kv_heads}
        require_split(TENSOR_AXIS, tensor, heads)
        window = backend.sliding_window
        tokens = {"page_size": backend.page_size} | ({"sliding_window": window} if window else {})
        require_split(CONTEXT_AXIS, context, tokens)
        local = dataclasses.replace(
            backend,
            num_q_heads=backend.num_q_heads // tensor,
            num_kv_heads=backend.num_kv_heads // tensor,
            page_size=backend.page_size // context,
            sliding_window=window and window // context,
        )
        return cls(local, mesh)

    def prepare(self, metadata: AttentionMetadata) -> AttentionMetadata | ContextRows:
        """What each device needs of a step's metadata; called once per step, for all layers.

        With R replicas every axis of tokens and sequences is R times as long, one replica after the other; lengths,
        page ids and slots count from 0 in each replica.
        """
        parts = axis_size(self.mesh, CONTEXT_AXIS)
        if parts == 1:
            return metadata
        split = shard_over(
            lambda metadata: rows_of_device(metadata, parts),
            self.mesh,
            in_specs=spec_over(self.mesh, DATA_AXIS),
            out_specs=spec_over(self.mesh, (DATA_AXIS, CONTEXT_AXIS)),
            check_vma=False,
        )
        rows: ContextRows = split(metadata)
        return rows

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        fused_kv: Buffer,
        metadata: AttentionMetadata | ContextRows,
        *,
        sinks: jax.Array | None = None,
        k_scale: jax.Array | None = None,
        v_scale: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """As ``FlashAttentionBackend``, over arrays that are split as the pool is, and metadata from ``prepare``."""
        by_device = isinstance(metadata, ContextRows)
        attend = partial(attend_part, self.local) if by_device else self.local.attend
        new, buffer = new_tokens_spec(self.mesh), buffer_spec(self.mesh)
        described = spec_over(self.mesh, (DATA_AXIS, CONTEXT_AXIS) if by_device else DATA_AXIS)
        split = shard_over(
            lambda *operands: attend(*operands).plain(),
            self.mesh,
            in_specs=(new, new, new, buffer, described, spec_over(self.mesh, TENSOR_AXIS)),
            out_specs=(new, buffer),
            check_vma=False,  # kernels do not say over which axes their results vary
        )
        result: tuple[jax.Array, Any] = split(q, k, v, fused_kv, metadata, HeadArrays(sinks, k_scale, v_scale))
        return result
