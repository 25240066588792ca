"""What the cache manager keeps, and how it is made right after a fault half way.

Rows hold pages, the prefix cache holds pages, and a row has a lock on those that both hold. Nothing else holds any; so
after a fault a row can be ended by what these three list, whatever had been done of a call.
"""

from __future__ import annotations

import numpy as np

from engine.errors import ConfigError, KVPoolExhausted
from engine.memory.admission import AdmissionRule
from engine.memory.integers import Int32
from engine.memory.offload.host_tier import HostTier
from engine.memory.offload.page_mover import HostPages, PageMover
from engine.memory.pages import NO_PAGES, PageIds
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator
from engine.memory.prefix.cache import EvictionPolicyName, RadixCache
from engine.memory.prefix.match import EvictedPages, PrefixMatch
from engine.memory.rows import ReqToTokenPool
from engine.memory.scope import CacheScope

EVICT_AT_ONCE = 64  # pages, at most a 32nd of the pool


class CacheBooks:
    """Allocator, page table, prefix cache and host tier of one pool; ``CacheManager`` is what is done with them.

    Args:
        size: usable token slots, a multiple of ``page_size``.
        page_size: tokens a page.
        max_requests: page-table rows.
        max_context_tokens: most tokens of one request.
        policy: of eviction from the prefix cache; None keeps nothing of past requests.
    """

    def __init__(
        self,
        size: int,
        page_size: int,
        max_requests: int,
        max_context_tokens: int,
        *,
        policy: EvictionPolicyName | None = "lru",
    ) -> None:
        self.size = size
        self.page_size = page_size
        self.allocator = PagedTokenToKVPoolAllocator(size, page_size)
        self.page_table = ReqToTokenPool(max_requests, max_context_tokens, page_size)
        self.caller = self.page_table.caller = self.allocator.caller  # one set of books
        self.prefix = (
            None
            if policy is None
            else RadixCache(self.allocator, page_size, policy=policy, on_evict=self._save_evicted)
        )
        self.host: HostPages | None = None
        self._locked: dict[int, PrefixMatch] = {}
        self._rule = AdmissionRule(self.page_table, size)
        self._is_forgotten = np.zeros(max_requests, np.bool_)  # rows of before a reset: they are not cached any more
        self._priority = np.zeros(max_requests, np.int64)

    def attach_host_tier(self, tier: HostTier, mover: PageMover) -> None:
        """From now on evicted pages go to ``tier`` and come back from it, moved by ``mover``.

        Raises:
            ConfigError: not a tier and a mover, or the tier's pages are of another size.
        """
        host = HostPages(tier, mover)
        if tier.page_format.page_size != self.page_size:
            raise ConfigError(
                f"the host tier has pages of {tier.page_format.page_size} tokens and the pool of {self.page_size}; "
                "both must be equal"
            )
        self.host = host

    def round_up(self, tokens: int) -> int:
        """``tokens`` in whole pages, counted in tokens."""
        return -(-tokens // self.page_size) * self.page_size

    @property
    def reclaimable_pages(self) -> int:
        """Pages that could be handed out now: free ones, and cached ones that nobody has locked."""
        return self.allocator.pages.available + (self.prefix.evictable_pages if self.prefix else 0)

    @property
    def held_tokens(self) -> int:
        """Tokens in pages that rows hold or that are locked: neither free nor evictable."""
        return self.size - self.reclaimable_pages * self.page_size

    def clear(self) -> None:
        """Takes every row and every page back and forgets every prefix, whatever state the books are in.

        For who goes on after a fault. It happens in place, and nothing that counts upwards goes back: rows,
        slots and matches from before are told to be stale. The host tier keeps its pages where its own books are sound.
        """
        self.caller.enter()
        self.page_table.clear()
        if self.prefix:
            self.prefix.clear()
        self.allocator.clear()
        self._locked.clear()
        for each in (self._rule.known, self._rule.most, self._priority, self._is_forgotten):
            each[:] = 0
        if self.host and not self.host.tier.is_sound():
            self.host.tier.clear()

    def check_integrity(self) -> None:
        """Proves that rows and prefix cache together hold exactly what the allocator says; else IntegrityError."""
        self.page_table.check_integrity()
        cached = np.empty(0, np.int32)
        if self.prefix:
            self.prefix.check_integrity()
            cached = self.prefix.pages()
        if self.host:
            self.host.tier.check_integrity()
        self.allocator.check_integrity(np.concatenate([self.page_table.held_pages(), cached]))

    def _has_room(self, known: int, most: int, shared_pages: int) -> bool:
        return self._rule.pages_needed(known, most, shared_pages) <= self.reclaimable_pages

    def _make_room(self, pages: int) -> None:
        short = pages - self.allocator.pages.available
        if short <= 0:
            return
        evictable = self.prefix.evictable_pages if self.prefix else 0
        if short > evictable:
            free = self.allocator.pages.available
            raise KVPoolExhausted(
                f"cannot allocate {pages} pages: {free} free and {evictable} evictable of {self.size // self.page_size}"
                "; lower max_running_requests or raise max_total_tokens",
                requested=pages * self.page_size,
                available=(free + evictable) * self.page_size,
            )
        if self.prefix:
            # More than is short where the pool is large: a call costs more than a page, and decoding asks for few.
            self.prefix.evict(min(max(short, min(EVICT_AT_ONCE, self.size // self.page_size // 32)), evictable))

    def _sharing(self, row: int, pages: Int32) -> list[tuple[int, int]]:
        """Who else holds pages that a row is about to have cached, as after a fork, each with how many from the first.

        They are to lock them as the row does: a page that is cached, held and not locked counts as evictable, and
        evicting it frees nothing.
        """
        known = self._locked[row].num_tokens // self.page_size
        if known >= pages.size or self.allocator.pages.ref_count(pages[known : known + 1])[0] == 1:
            return []
        sharing = self.page_table.rows_that_share(row, pages, known)
        return [each for each in sharing if self._locked[each[0]].num_tokens < each[1] * self.page_size]

    def _advance(self, rows: list[tuple[int, int]], scope: CacheScope, tokens: Int32, pages: Int32) -> None:
        """Has the first so many pages cached for each row, which moves its lock to their end."""
        try:
            self._advance_each(rows, scope, tokens, pages)
        except BaseException:
            if len(rows) > 1:  # to the end: what one has cached, each that holds it must lock
                self._advance_each(rows, scope, tokens, pages)
            raise

    def _advance_each(self, rows: list[tuple[int, int]], scope: CacheScope, tokens: Int32, pages: Int32) -> None:
        for row, count in rows:
            mine, priority = tokens[: count * self.page_size], int(self._priority[row])
            if self.prefix:
                held = self._locked[row]
                self._locked[row] = self.prefix.advance(held, scope, mine, pages[:count], priority=priority)

    def _take_back(self, row: int | None, matches: list[PrefixMatch | None], pages: Int32) -> None:
        """Ends a row, as far as it was begun or not ended yet: its locks, its pages, what is known of its request.

        Args:
            row: None where there is none yet.
            matches: of which each row that has one keeps a lock.
            pages: of which rows and prefix cache keep what they list.
        """
        if row is not None:
            matches = [*matches, self._locked.pop(row, None)]
            if self.page_table.is_in_use(row):
                pages = np.concatenate([pages, self.page_table.release(row)])
            self._rule.known[row], self._is_forgotten[row] = 0, False
        kept = list(self._locked.values())
        for match in matches:
            while self.prefix and match and match.locks > kept.count(match):
                self.prefix.unlock(match)
        held = np.concatenate([self.page_table.held_pages(), self.prefix.pages() if self.prefix else NO_PAGES])
        distinct = np.unique(pages)
        surplus = self.allocator.pages.ref_count(distinct) - np.bincount(held, minlength=self.size + 1)[distinct]
        self.allocator.pages.release(PageIds(np.repeat(distinct, surplus.clip(min=0))))

    def _save_evicted(self, evicted: list[EvictedPages]) -> None:
        if self.host:
            self.host.save(evicted)
