"""Joins allocator, page table, prefix cache and host tier: what a request's memory goes through.

    admit     prefix found → its pages locked and shared → the rest promised → a page-table row
    grow      evicts what is short → the allocator hands out slots → the row grows
    publish   full pages enter the prefix cache, so that who begins alike shares them
    release   the row's references go back; what the prefix cache holds stays until it is evicted

Every page is free, held by rows, cached, or both of the last; a page is returned to the allocator when its last holder
lets go.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import KVPoolExhausted, ShapeError
from engine.memory.decoding_rows import DecodingRows
from engine.memory.host_tier import HostTier
from engine.memory.integers import Int32, Int64
from engine.memory.page_allocator import PagedTokenToKVPoolAllocator
from engine.memory.page_mover import HostPages, PageMover
from engine.memory.page_table import ReqToTokenPool
from engine.memory.prefix_cache import EvictionPolicyName, RadixCache
from engine.memory.prefix_match import EvictedPages, PrefixMatch
from engine.memory.row_growth import RowGrowth
from engine.memory.scope import CacheScope

# Of a page's tokens: so many steps ahead each running request finds its pages when another is admitted.
LOOKAHEAD_SHARE = 8
EVICT_AT_ONCE = 64  # pages, at most a 32nd of the pool


@dataclass(frozen=True)
class Admission:
    """What a request got when it was admitted.

    Attributes:
        row: its page-table row, ``req_pool_idx``.
        cached_tokens: tokens whose pages were found on the device.
        loaded_tokens: tokens after them whose pages came back from the host.
    """

    row: int
    cached_tokens: int
    loaded_tokens: int


class CacheManager:
    """Pages and page-table rows of the running requests, and what is kept of past ones.

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
        self.prefix = (
            None
            if policy is None
            else RadixCache(self.allocator, page_size, policy=policy, on_evict=self._save_evicted)
        )
        self.host: HostPages | None = None
        self._locked: dict[int, PrefixMatch] = {}
        # By row: the tokens that its request knew when it was admitted (0: no request), and the most it can need.
        self._known = np.zeros(max_requests, np.int64)
        self._most = np.zeros(max_requests, np.int64)
        self._lookahead = max(page_size // LOOKAHEAD_SHARE, 1)
        self._is_forgotten = np.zeros(max_requests, np.bool_)  # rows of before a reset: they are not cached any more
        self._priority = np.zeros(max_requests, np.int64)

    def attach_host_tier(self, tier: HostTier, mover: PageMover) -> None:
        """From now on evicted pages go to ``tier`` and come back from it, moved by ``mover``."""
        self.host = HostPages(tier, mover)

    def round_up(self, tokens: int) -> int:
        """``tokens`` in whole pages, counted in tokens."""
        return -(-tokens // self.page_size) * self.page_size

    @property
    def reclaimable_pages(self) -> int:
        """Pages that could be handed out now: free ones, and cached ones that nobody has locked."""
        return self.allocator.available_pages() + (self.prefix.evictable_pages if self.prefix else 0)

    @property
    def held_tokens(self) -> int:
        """Tokens in pages that rows hold or that are locked: neither free nor evictable."""
        return self.size - self.reclaimable_pages * self.page_size

    def admit(
        self,
        scope: CacheScope,
        token_ids: Int32,
        *,
        most_tokens: int | None = None,
        priority: int = 0,
        counts_hit: bool = True,
    ) -> Admission | None:
        """Gives a request a row and the pages that are cached of its tokens, or None while there is no room or no row.

        The rule: for this request and for each that runs, there must be pages for the tokens that it knows and for
        what it may add in the next steps, an eighth of a page's tokens, but no more than it can ever need. So nobody
        who was let in is short of pages at once, and hardly any page waits for a token that never comes.

        Args:
            scope: under which its keys and values may be shared.
            token_ids: its known tokens, int32 ``[n]``; at least the last is always computed.
            most_tokens: most that it can need, all told; None is as many as a row or the pool can hold.
            priority: of its pages in the prefix cache, where the policy of eviction reads it.
            counts_hit: whether this is a query of the prefix cache to be counted: not for a request that comes back.

        Raises:
            ShapeError: there are no tokens, or more than a row can hold.
            Exception: what the host tier or the mover raises; nothing is admitted then.
        """
        if not 1 <= len(token_ids) <= self.page_table.max_context_tokens:
            raise ShapeError(
                f"cannot admit {len(token_ids)} tokens: a request has from 1 to {self.page_table.max_context_tokens}"
            )
        if not self.page_table.available_rows:
            return None
        found = self.prefix.match(scope, token_ids) if self.prefix else None
        if self.prefix and found:
            self.prefix.lock(found)
        pages = found.pages if found else np.empty(0, np.int32)
        most = min(most_tokens or self.size, self.page_table.max_context_tokens, self.size)
        if not self._has_room(len(token_ids), most, pages.size):
            if self.prefix and found:
                self.prefix.unlock(found)
            return None
        row = self.page_table.alloc_row()
        self.allocator.retain(pages)
        self.page_table.append_pages(row, pages)
        self._known[row], self._most[row], self._priority[row] = len(token_ids), most, priority
        if self.prefix and found:
            self._locked[row] = found
        try:
            loaded = self._load(row, scope, token_ids) if self.host else 0
        except BaseException:  # an interrupt too: the caller never learns of this row
            self.release(row, scope, token_ids[:0])
            raise
        if self.prefix and found and counts_hit:
            self.prefix.record(found)  # a hit only now that the row is there
        return Admission(row, pages.size * self.page_size, loaded * self.page_size)

    def cached_tokens(self, scope: CacheScope, token_ids: Int32) -> int:
        """How many of a request's tokens ``admit`` would find on the device now; changes nothing."""
        return self.prefix.match(scope, token_ids).num_tokens if self.prefix else 0

    def locked_pages(self, row: int) -> int:
        """Cached pages that a row keeps from eviction."""
        match = self._locked.get(row)
        return 0 if match is None else match.num_tokens // self.page_size

    def plan_growth(self, rows: Int32, counts: Int64) -> RowGrowth:
        """What it takes to give each row ``counts`` more tokens, see ``ReqToTokenPool.plan_growth``."""
        return self.page_table.plan_growth(rows, counts)

    def has_room_for(self, growth: RowGrowth) -> bool:
        """Whether ``grow_as_planned`` would find the pages, by eviction if need be."""
        return growth.num_pages <= self.reclaimable_pages

    def grow_as_planned(self, growth: RowGrowth) -> None:
        """Gives rows their pages. All rows or none.

        Raises:
            ShapeError: the rows have changed since the growth was planned.
            KVPoolExhausted: too few pages are free or evictable.
        """
        self._make_room(growth.num_pages)
        # All else that the page table could refuse was checked: nothing stands between taking pages and noting them.
        self.page_table.check_unchanged(growth)
        self.page_table.grow(growth, self.allocator.alloc_pages(growth.fresh))

    def grow(self, rows: Int32, counts: Int64) -> None:
        """Gives each row pages for ``counts`` more tokens. All rows or none.

        Raises:
            ShapeError: a row is not in use or listed twice, would exceed the context, or a count is missing or
                negative.
            KVPoolExhausted: too few pages are free or evictable.
        """
        self.grow_as_planned(self.plan_growth(rows, counts))

    def has_room_to_decode(self, rows: DecodingRows) -> bool:
        """Whether ``grow_decoding`` would find the pages, by eviction if need be."""
        beginning = rows.beginning().size
        return beginning <= self.allocator.available_pages() or beginning <= self.reclaimable_pages

    def grow_decoding(self, rows: DecodingRows) -> None:
        """Gives each row a page where it begins one, and a token more. All rows or none.

        Raises:
            ShapeError: the rows have changed otherwise.
            KVPoolExhausted: too few pages are free or evictable.
        """
        rows.check_unchanged()  # before anything is evicted or taken
        beginning = rows.beginning()
        self._make_room(beginning.size)
        rows.grow(beginning, self.allocator.alloc_single_pages(beginning.size))

    def can_fork(self, row: int, tokens: int) -> bool:
        """Whether ``fork`` keeps the rule by which ``admit`` lets in."""
        has_row = self.page_table.available_rows > 0
        return has_row and self._has_room(tokens + 1, int(self._most[row]), tokens // self.page_size)

    def fork(self, row: int, tokens: int) -> tuple[int, Int32, Int32]:
        """Gives a new row the first ``tokens`` tokens of ``row``: full pages shared, the partial last one to be copied.

        Returns:
            The new row, and int32 source and target pages of the copy that the caller must make on the device; empty
            where ``tokens`` ends on a page boundary.

        Raises:
            ShapeError: ``row`` holds fewer tokens.
            KVPoolExhausted: there is no row, or no page for the partial one.
        """
        if tokens > self.page_table.kv_len(row):
            raise ShapeError(f"cannot fork {tokens} tokens of row {row}: it holds {self.page_table.kv_len(row)}")
        full, rest = divmod(tokens, self.page_size)
        pages = self.page_table.row_pages(row)
        new_row = self.page_table.alloc_row()
        self._known[new_row] = tokens + 1
        for each in (self._most, self._priority, self._is_forgotten):
            each[new_row] = each[row]
        try:
            self.allocator.retain(pages[:full])
            self.page_table.append_pages(new_row, pages[:full])
            if self.prefix and row in self._locked:
                self.prefix.lock(self._locked[row])  # once more: a handle may be shared
                self._locked[new_row] = self._locked[row]
            if rest:
                self.grow(np.array([new_row], np.int32), np.array([rest], np.int64))
        except BaseException:  # an interrupt too: the caller never learns of this row
            self._give_back(new_row)
            raise
        target = self.page_table.row_pages(new_row)[full:]
        return new_row, pages[full : full + bool(rest)].copy(), target

    def publish(self, row: int, scope: CacheScope, token_ids: Int32) -> None:
        """Offers the full pages of a running row to the prefix cache.

        Args:
            row: of a running request.
            scope: under which its keys and values may be shared.
            token_ids: the tokens that the row's slots hold, int32 ``[n]``; what exceeds the row is ignored.
        """
        if self.prefix is None or self._is_forgotten[row]:
            return
        tokens, pages, priority = self._full_pages(row, token_ids)
        self._locked[row] = self.prefix.advance(self._locked[row], scope, tokens, pages, priority=priority)

    def release(self, row: int, scope: CacheScope, token_ids: Int32) -> None:
        """Gives back a row and its pages, also where it raises; the full ones stay in the prefix cache.

        Raises:
            Exception: what the prefix cache raises; then they do not stay.
        """
        try:
            if self.prefix is not None and not self._is_forgotten[row]:
                tokens, pages, priority = self._full_pages(row, token_ids)
                self.prefix.finish(self._locked[row], scope, tokens, pages, priority=priority)
                del self._locked[row]
        finally:
            self._give_back(row)

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix, on the device and on the host.

        Running requests keep their pages, and none of these is cached later: what was computed before is not found.
        """
        if self.prefix:
            self.prefix.reset()
        self._is_forgotten[self._known > 0] = True
        if self.host:
            self.host.tier.reset()

    def clear(self) -> None:
        """Takes every row and every page back and forgets every prefix, whatever state the books are in.

        For whoever goes on after a fault. It happens in place, and nothing that counts upwards goes back: rows,
        slots and matches from before are told to be stale. The host tier keeps its pages where its own books are sound.
        """
        self.page_table.clear()
        if self.prefix:
            self.prefix.clear()
        self.allocator.clear()
        self._locked.clear()
        for each in (self._known, self._most, self._priority, self._is_forgotten):
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

    def _reserved_pages(self) -> int:
        """Pages that running requests will need soon by the rule of ``admit``, and do not have yet."""
        rows = np.flatnonzero(self._known).astype(np.int32)
        lens = self.page_table.kv_lens(rows).astype(np.int64)
        soon = self._soon(np.maximum(lens, self._known[rows]), self._most[rows])
        return int((-(-soon // self.page_size) - -(-lens // self.page_size)).sum())

    def _soon(self, known: Int64, most: Int64) -> Int64:
        """How many tokens requests will have soon."""
        return np.maximum(known, np.minimum(known + self._lookahead, most))

    def _has_room(self, known: int, most: int, shared_pages: int) -> bool:
        """Whether the rule of ``admit`` holds with one more request."""
        soon = int(self._soon(np.array([known]), np.array([most]))[0])
        wanted = -(-soon // self.page_size) - shared_pages
        return wanted + self._reserved_pages() <= self.reclaimable_pages

    def _make_room(self, pages: int) -> None:
        short = pages - self.allocator.available_pages()
        if short <= 0:
            return
        evictable = self.prefix.evictable_pages if self.prefix else 0
        if short > evictable:
            free = self.allocator.available_pages()
            raise KVPoolExhausted(
                f"cannot allocate {pages} pages: {free} free and {evictable} evictable of {self.size // self.page_size}"
                "; lower max_running_requests or raise max_total_tokens",
                requested=pages * self.page_size,
                available=(free + evictable) * self.page_size,
            )
        if self.prefix:
            # More than is short where the pool is large: a call costs more than a page, and decoding asks for few.
            self.prefix.evict(min(max(short, min(EVICT_AT_ONCE, self.size // self.page_size // 32)), evictable))

    def _full_pages(self, row: int, token_ids: Int32) -> tuple[Int32, Int32, int]:
        """A row's full pages as far as their tokens are told: these tokens, the pages, and the row's priority."""
        pages = self.page_table.full_pages(row, len(token_ids))
        return token_ids[: pages.size * self.page_size], pages, int(self._priority[row])

    def _give_back(self, row: int) -> None:
        """Ends a row and all that it holds: its lock, its pages, what is known of its request."""
        if self.prefix and row in self._locked:
            self.prefix.unlock(self._locked.pop(row))
        self.allocator.release(self.page_table.release(row))
        self._known[row] = 0
        self._is_forgotten[row] = False

    def _load(self, row: int, scope: CacheScope, token_ids: Int32) -> int:
        """Brings back from the host what follows the row's tokens there; returns the pages."""
        if self.host is None:
            return 0
        wanted = token_ids[: len(token_ids) - 1]
        held = self.page_table.kv_len(row) // self.page_size
        data = self.host.tier.get(scope, wanted, held)
        if len(data):
            self.grow(np.array([row], np.int32), np.array([len(data) * self.page_size], np.int64))
            self.host.mover.write(self.page_table.row_pages(row)[held:], data)
            self.publish(row, scope, token_ids)
        return len(data)

    def _save_evicted(self, evicted: list[EvictedPages]) -> None:
        if self.host:
            self.host.save(evicted)
