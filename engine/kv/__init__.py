"""The numbers of the cache on the device: the fused layout, the pool of buffers, the writing of tokens, page copies.

This room never knows which request or prefix a page belongs to: only slots and page ids come in, as integers.

    layout        the rule of the fused layout, in array code; KVLayout, its versioned descriptor, padding included
    narrow        int8 and int4: NarrowKV, codes with a scale for each token and row; their quantisation
    stored        what a buffer holds as float32, by slots and pages: for attention in XLA and checks
    pool          TokenToKVPool: one buffer per layer, a pytree
    scatter       set_kv_buffer: writes new keys and values in place
    scatter_gpu   the same as a kernel for Hopper GPUs
    scatter_tpu   the same as a kernel for TPUs
    gpu_target    whether a call is lowered for a Hopper GPU
    tpu_view      the packed view of a buffer's bytes on a TPU
    page_copy     read_pages, start_reading, write_pages, copy_pages: whole pages, all layers in one program
    split         how buffers are split over a mesh
    room          whether buffers fit into memory
"""

from engine.kv.layout import KVLayout, extract_k_from_fused_kv, extract_v_from_fused_kv, merge_kv
from engine.kv.narrow import NarrowKV
from engine.kv.page_copy import PageRead, copy_pages, read_pages, start_reading, write_pages
from engine.kv.pool import TokenToKVPool
from engine.kv.scatter import set_kv_buffer

__all__ = [
    "KVLayout",
    "NarrowKV",
    "PageRead",
    "TokenToKVPool",
    "copy_pages",
    "extract_k_from_fused_kv",
    "extract_v_from_fused_kv",
    "merge_kv",
    "read_pages",
    "set_kv_buffer",
    "start_reading",
    "write_pages",
]
