"""The numbers of the cache on the device: the fused layout, the pool of buffers, the writing of tokens, page copies.

This room never knows which request or prefix a page belongs to: only slots and page ids come in, as integers.
"""

from engine.kv.layout import KVLayout, extract_k_from_fused_kv, extract_v_from_fused_kv, merge_kv
from engine.kv.page_copy import copy_pages, read_pages, write_pages
from engine.kv.pool import TokenToKVPool
from engine.kv.scatter import set_kv_buffer

__all__ = [
    "KVLayout",
    "TokenToKVPool",
    "copy_pages",
    "extract_k_from_fused_kv",
    "extract_v_from_fused_kv",
    "merge_kv",
    "read_pages",
    "set_kv_buffer",
    "write_pages",
]
