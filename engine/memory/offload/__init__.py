"""Pages outside of the device: the host tier, and the directory of saved prefixes that outlives the process.

It knows scopes, tokens and the bytes of pages; it never knows a page id of the pool or a request, and never moves bytes
from or to the device.

    page_format.py  what the bytes of a page mean; a segment: consecutive pages of one prefix with their tokens
    page_trie.py    the prefixes that the host tier has, by scope
    host_tier.py    HostTier: pages in host memory under a byte budget
    store.py        PrefixStore: segments in files (import it from there: it needs safetensors)
    page_mover.py   joins the host tier to what copies pages between host and device
"""

from engine.memory.offload.host_tier import HostTier, HostTierCounters
from engine.memory.offload.page_format import PageFormat, Pages, PrefixSegment

__all__ = ["HostTier", "HostTierCounters", "PageFormat", "Pages", "PrefixSegment"]
