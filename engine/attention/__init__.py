"""Attention over the fused, paged cache: writes a step's new keys and values, then attends.

This room checks a call, chooses an implementation (``impl``) and runs it, on one device or over a mesh. It never
allocates a page and never knows of a request: a step comes as integers (``AttentionMetadata``).
"""

from engine.attention.call import ragged_paged_attention
from engine.attention.layer import FlashAttentionBackend
from engine.attention.mesh_attention import MeshAttention
from engine.attention.metadata import AttentionMetadata

__all__ = ["AttentionMetadata", "FlashAttentionBackend", "MeshAttention", "ragged_paged_attention"]
