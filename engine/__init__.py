"""A KV-cache memory subsystem for LLM serving engines on JAX.

The names below are the public contract. Each is imported when it is first used, so that the control plane
(allocator, page table) can be used without loading jax.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ragged_paged_attention": "engine.attention",
    "AttentionMetadata": "engine.attention",
    "FlashAttentionBackend": "engine.attention",
    "EngineConfig": "engine.config",
    "BackendUnsupported": "engine.errors",
    "CheckpointError": "engine.errors",
    "ConfigError": "engine.errors",
    "DoubleFreeError": "engine.errors",
    "EngineError": "engine.errors",
    "IntegrityError": "engine.errors",
    "KVPoolExhausted": "engine.errors",
    "ProcessLost": "engine.errors",
    "RequestError": "engine.errors",
    "RequestTooLarge": "engine.errors",
    "ShapeError": "engine.errors",
    "KVLayout": "engine.kv.layout",
    "extract_k_from_fused_kv": "engine.kv.layout",
    "extract_v_from_fused_kv": "engine.kv.layout",
    "merge_kv": "engine.kv.layout",
    "copy_pages": "engine.kv.page_copy",
    "read_pages": "engine.kv.page_copy",
    "write_pages": "engine.kv.page_copy",
    "TokenToKVPool": "engine.kv.pool",
    "set_kv_buffer": "engine.kv.scatter",
    "CacheManager": "engine.memory.manager",
    "HostTier": "engine.memory.offload",
    "PagedTokenToKVPoolAllocator": "engine.memory.pages.slot_allocator",
    "PageFormat": "engine.memory.offload.page_format",
    "ReqToTokenPool": "engine.memory.rows",
    "RadixCache": "engine.memory.prefix",
    "PrefixStore": "engine.memory.offload.store",
    "Adapter": "engine.memory.scope",
    "CacheScope": "engine.memory.scope",
    "LayoutKey": "engine.memory.scope",
    "make_mesh": "engine.distributed.mesh",
    "LLM": "engine.serving.llm",
    "RequestOutput": "engine.serving.request",
    "SamplingParams": "engine.serving.request",
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
