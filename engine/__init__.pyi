from engine.attention import AttentionMetadata, FlashAttentionBackend, ragged_paged_attention
from engine.config import EngineConfig
from engine.distributed.mesh import make_mesh
from engine.errors import (
    BackendUnsupported,
    CheckpointError,
    ConfigError,
    DoubleFreeError,
    EngineError,
    IntegrityError,
    KVPoolExhausted,
    ProcessLost,
    RequestError,
    RequestTooLarge,
    ShapeError,
)
from engine.kv.layout import KVLayout, extract_k_from_fused_kv, extract_v_from_fused_kv, merge_kv
from engine.kv.page_copy import copy_pages, read_pages, write_pages
from engine.kv.pool import TokenToKVPool
from engine.kv.scatter import set_kv_buffer
from engine.memory.manager import CacheManager
from engine.memory.offload import HostTier
from engine.memory.offload.page_format import PageFormat
from engine.memory.offload.store import PrefixStore
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator
from engine.memory.prefix import RadixCache
from engine.memory.rows import ReqToTokenPool
from engine.memory.scope import Adapter, CacheScope, LayoutKey
from engine.serving.llm import LLM
from engine.serving.request import RequestOutput, SamplingParams

__all__ = [
    "LLM",
    "Adapter",
    "AttentionMetadata",
    "BackendUnsupported",
    "CacheManager",
    "CacheScope",
    "CheckpointError",
    "ConfigError",
    "DoubleFreeError",
    "EngineConfig",
    "EngineError",
    "FlashAttentionBackend",
    "HostTier",
    "IntegrityError",
    "KVLayout",
    "KVPoolExhausted",
    "LayoutKey",
    "PageFormat",
    "PagedTokenToKVPoolAllocator",
    "PrefixStore",
    "ProcessLost",
    "RadixCache",
    "ReqToTokenPool",
    "RequestError",
    "RequestOutput",
    "RequestTooLarge",
    "SamplingParams",
    "ShapeError",
    "TokenToKVPool",
    "copy_pages",
    "extract_k_from_fused_kv",
    "extract_v_from_fused_kv",
    "make_mesh",
    "merge_kv",
    "ragged_paged_attention",
    "read_pages",
    "set_kv_buffer",
    "write_pages",
]

__version__: str
