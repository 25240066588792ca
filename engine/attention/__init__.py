"""Attention over the fused, paged cache: writes a step's new keys and values, then attends.

This room checks a call, chooses an implementation (``impl``) and runs it, on one device or over a mesh. It never
allocates a page and never knows of a request: a step comes as integers (``AttentionMetadata``).

    call               ragged_paged_attention: checks, choice of the implementation, the write, scales
    layer              FlashAttentionBackend: the call with a model's options, bound once
    metadata           AttentionMetadata: what one step tells attention; positions and slots of new tokens
    window_table       the part of a page table that layers with a window see
    options            the options of a call, and its arrays per head
    checks             refusals of wrong arguments
    mesh_attention     MeshAttention: the layer over a mesh
    context_parallel   attention over pages whose tokens are dealt out to several devices
    impl/              the implementations, of one signature: reference, xla, cpu, tpu/, gpu/
"""

from engine.attention.call import ragged_paged_attention
from engine.attention.layer import FlashAttentionBackend
from engine.attention.mesh_attention import MeshAttention
from engine.attention.metadata import AttentionMetadata

__all__ = ["AttentionMetadata", "FlashAttentionBackend", "MeshAttention", "ragged_paged_attention"]
