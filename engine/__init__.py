"""A KV-cache memory subsystem for LLM serving engines on JAX.

It owns the memory of keys and values: one fused buffer per layer on the device (``engine.kv``), attention over its
pages (``engine.attention``), and on the host the books of which page belongs to whom (``engine.memory``). Another
engine embeds these three: ``CacheManager`` decides, ``TokenToKVPool`` holds, ``FlashAttentionBackend`` writes and
attends (docs/embedding.md). ``LLM`` is an engine that does so.

The names below are the public contract. Each is imported when it is first used, so that the control plane runs without
loading jax.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AttentionMetadata": "engine.attention",
    "FlashAttentionBackend": "engine.attention",
    "MeshAttention": "engine.attention",
    "ragged_paged_attention": "engine.attention",
    "EngineConfig": "engine.config",
    "make_mesh": "engine.distributed",
    "BackendUnsupported": "engine.errors",
    "CheckpointError": "engine.errors",
    "ConcurrentUse": "engine.errors",
    "ConfigError": "engine.errors",
    "DoubleFreeError": "engine.errors",
    "EngineError": "engine.errors",
    "IntegrityError": "engine.errors",
    "Interrupted": "engine.errors",
    "KVPoolExhausted": "engine.errors",
    "ProcessLost": "engine.errors",
    "RequestError": "engine.errors",
    "RequestTooLarge": "engine.errors",
    "ShapeError": "engine.errors",
    "KVLayout": "engine.kv",
    "PageRead": "engine.kv",
    "TokenToKVPool": "engine.kv",
    "copy_pages": "engine.kv",
    "extract_k_from_fused_kv": "engine.kv",
    "extract_v_from_fused_kv": "engine.kv",
    "merge_kv": "engine.kv",
    "read_pages": "engine.kv",
    "set_kv_buffer": "engine.kv",
    "start_reading": "engine.kv",
    "write_pages": "engine.kv",
    "Adapter": "engine.memory",
    "Admission": "engine.memory",
    "CacheManager": "engine.memory",
    "CacheScope": "engine.memory",
    "EventsMissed": "engine.memory",
    "EvictedPages": "engine.memory",
    "HostTier": "engine.memory",
    "LayerGroups": "engine.layer_groups",
    "LayoutKey": "engine.memory",
    "PageCopy": "engine.memory",
    "PagedTokenToKVPoolAllocator": "engine.memory",
    "PageFormat": "engine.memory",
    "PageIds": "engine.memory",
    "PageLoad": "engine.memory",
    "PageMove": "engine.memory",
    "PagePool": "engine.memory",
    "PagesCached": "engine.memory",
    "PagesLost": "engine.memory",
    "PrefixesForgotten": "engine.memory",
    "PrefixSegment": "engine.memory",
    "RadixCache": "engine.memory",
    "ReqToTokenPool": "engine.memory",
    "media_tokens": "engine.memory",
    "Slots": "engine.memory",
    "PrefixStore": "engine.memory.offload.store",
    "PromptTooLong": "engine.errors",
    "QueueFull": "engine.errors",
    "AsyncLLM": "engine.serving.async_llm",
    "LLM": "engine.serving.llm",
    "AnswerDelta": "engine.serving.request",
    "RequestOutput": "engine.serving.request",
    "SamplingParams": "engine.serving.sampling_params",
}

__all__ = sorted(_HOMES)  # typed in __init__.pyi


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("engine.version").package_version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
