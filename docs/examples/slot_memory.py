"""Memory for an engine that exists and counts in slots, one for each token, as SGLang's and sglang-jax's do.

Such an engine keeps, for each request, an array of the slots of its tokens, and calls a token allocator and a prefix
tree. This is all that it needs in their place; docs/foreign-engines.md has the rest. With none of its code the file
plays a few requests:

    python docs/examples/slot_memory.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine import CacheScope, KVPoolExhausted, LayoutKey, PagedTokenToKVPoolAllocator, PageIds, RadixCache
from engine.memory.prefix import PrefixMatch

Int32 = npt.NDArray[np.int32]


@dataclass(eq=False)
class Held:
    """What a request holds.

    Attributes:
        match: its lock on cached pages, from its first token on.
        slots: int32 ``[n]``, of its first n tokens.
        own: references to pages that it gives back at its end.
    """

    match: PrefixMatch
    slots: Int32
    own: list[int]


class SlotMemory:
    """An allocator and a prefix tree as one.

    Args:
        size: usable token slots, a multiple of ``page_size``.
        page_size: tokens per page.
        scope: what must be equal, besides the tokens, for cached keys and values to be the right ones.
    """

    def __init__(self, size: int, page_size: int, scope: CacheScope) -> None:
        self.allocator = PagedTokenToKVPoolAllocator(size, page_size)
        self.cache = RadixCache(self.allocator, page_size)
        self.scope = scope

    def begin(self, tokens: Int32) -> Held:
        """A request with the slots of what is cached of its tokens, which are not to be computed."""
        match = self.cache.match(self.scope, tokens)
        self.cache.lock(match)
        self.cache.record(match)
        return Held(match, self._slots_of(match.pages), [])

    def extend(self, requests: Sequence[Held], lengths: Sequence[int]) -> Int32:
        """Slots for all tokens of some requests up to ``lengths``, one request after the other.

        Raises:
            KVPoolExhausted: also without all that is evictable there are too few pages; end or retract a request.
        """
        before = [held.slots.size for held in requests]
        last = [held.slots[-1] if held.slots.size else -1 for held in requests]
        try:
            new = self.allocator.alloc_extend(before, lengths, last)
        except KVPoolExhausted as shortage:
            self.cache.evict(-(-(shortage.requested - shortage.available) // self.allocator.page_size))
            new = self.allocator.alloc_extend(before, lengths, last)
        ends = np.cumsum(np.subtract(lengths, before))
        for held, fresh in zip(requests, np.split(np.asarray(new), ends[:-1]), strict=True):
            held.own += (fresh[fresh % self.allocator.page_size == 0] // self.allocator.page_size).tolist()
            held.slots = np.concatenate([held.slots, fresh])
        return new

    def publish(self, held: Held, tokens: Int32) -> None:
        """Caches the full pages of the ``tokens`` that were computed.

        Where a page of the same tokens was cached meanwhile, the request takes it and gives its own back. Steps under
        way may still read what is given back: it is written by later steps alone.
        """
        held.match = self.cache.advance(held.match, self.scope, tokens, self._pages_of(held, tokens))
        cached = self._slots_of(held.match.pages)
        held.slots = np.concatenate([cached, held.slots[cached.size :]])
        kept = set((held.slots[cached.size :] // self.allocator.page_size).tolist())
        self._release([page for page in held.own if page not in kept])
        held.own = [page for page in held.own if page in kept]

    def end(self, held: Held, tokens: Int32) -> None:
        """Takes everything back; what was computed of ``tokens`` stays cached."""
        self.cache.finish(held.match, self.scope, tokens, self._pages_of(held, tokens))
        self._release(held.own)
        held.own = []

    def _pages_of(self, held: Held, tokens: Int32) -> Int32:
        size = self.allocator.page_size
        return (held.slots[: tokens.size // size * size : size] // size).astype(np.int32)

    def _slots_of(self, pages: Int32) -> Int32:
        size = self.allocator.page_size
        slots: Int32 = np.add.outer(pages * np.int32(size), np.arange(size, dtype=np.int32)).reshape(-1)
        return slots

    def _release(self, pages: list[int]) -> None:
        self.allocator.pages.release(PageIds(np.array(pages, np.int32)))


def main() -> None:
    """Three requests with the same beginning."""
    memory = SlotMemory(64, 4, CacheScope("my weights", 0, None, "", LayoutKey.of({"version": 1})))
    prompt = np.arange(18, dtype=np.int32)
    for number in range(3):
        held = memory.begin(prompt)
        found = held.slots.size
        memory.extend([held], [prompt.size])  # here the engine computes the tokens behind the first ``found``
        memory.end(held, prompt)
        print(f"request {number}: {found} of {prompt.size} tokens were cached")


if __name__ == "__main__":
    main()
