from engine.attention.api import ragged_paged_attention
from engine.attention.backend import AttentionMetadata, FlashAttentionBackend
from engine.config import EngineConfig
from engine.errors import (
    BackendUnsupported,
    CheckpointError,
    ConfigError,
    DoubleFreeError,
    EngineError,
    IntegrityError,
    KVPoolExhausted,
    RequestError,
    RequestTooLarge,
    ShapeError,
)
from engine.kv.layout import KVLayout, extract_k_from_fused_kv, extract_v_from_fused_kv, merge_kv
from engine.kv.pool import TokenToKVPool
from engine.kv.scatter import set_kv_buffer
from engine.memory.page_allocator import PagedTokenToKVPoolAllocator
from engine.memory.page_table import ReqToTokenPool
from engine.memory.prefix_cache import RadixCache
from engine.serving.llm import LLM
from engine.serving.request import RequestOutput, SamplingParams

__all__ = [
    "LLM",
    "AttentionMetadata",
    "BackendUnsupported",
    "CheckpointError",
    "ConfigError",
    "DoubleFreeError",
    "EngineConfig",
    "EngineError",
    "FlashAttentionBackend",
    "IntegrityError",
    "KVLayout",
    "KVPoolExhausted",
    "PagedTokenToKVPoolAllocator",
    "RadixCache",
    "ReqToTokenPool",
    "RequestError",
    "RequestOutput",
    "RequestTooLarge",
    "SamplingParams",
    "ShapeError",
    "TokenToKVPool",
    "extract_k_from_fused_kv",
    "extract_v_from_fused_kv",
    "merge_kv",
    "ragged_paged_attention",
    "set_kv_buffer",
]

__version__: str
