"""Pages outside of the device: the host tier, and the directory of saved prefixes that outlives the process.

It knows scopes, tokens and the bytes of pages; it never knows a page id of the pool or a request, and never moves bytes
from or to the device.

    page_format  PageFormat: what the bytes of a page mean; PrefixSegment: pages of one prefix with their tokens
    page_trie    the prefixes that the host tier has, by scope
    host_tier    HostTier: pages in host memory under a byte budget
    store        PrefixStore: segments in files (import it from there: it needs safetensors)
"""

from engine.memory.offload.host_tier import HostTier, HostTierCounters
from engine.memory.offload.page_format import PageFormat, Pages, PrefixSegment

__all__ = ["HostTier", "HostTierCounters", "PageFormat", "Pages", "PrefixSegment"]
