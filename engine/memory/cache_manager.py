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

from engine.errors import ConfigError, KVPoolExhausted, RequestTooLarge, ShapeError
from engine.memory.decoding_rows import DecodingRows
from engine.memory.host_tier import HostTier
from engine.memory.integers import Int32, Int64, priority_level, whole_number
from engine.memory.page_allocator import PagedTokenToKVPoolAllocator
from engine.memory.page_mover import HostPages, PageMover
from engine.memory.page_table import ReqToTokenPool
from engine.memory.prefix_cache import EvictionPolicyName, RadixCache
from engine.memory.prefix_match import EvictedPages, PrefixMatch, checked_scope, token_vector
from engine.memory.radix_tree import NO_PAGES
from engine.memory.row_growth import RowGrowth
from engine.memory.scope import CacheScope

# Of a page's tokens: so many steps ahead each running request finds its pages when another is admitted.
LOOKAHEAD_SHARE = 8
MOVES = ("read", "write", "copy")  # of a page mover
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

    A call that raises has changed nothing, whatever raises in it, but that cached pages may have been evicted to make
    room and that ``release`` always gives back. One thread at a time: a call that begins while another thread is in one
    is refused with ConcurrentUse, and so is any call in a fork of the process.

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
        # By row: the tokens that its request knew when it was admitted (0: no request), and the most it can need.
        self._known = np.zeros(max_requests, np.int64)
        self._most = np.zeros(max_requests, np.int64)
        self._lookahead = max(page_size // LOOKAHEAD_SHARE, 1)
        self._is_forgotten = np.zeros(max_requests, np.bool_)  # rows of before a reset: they are not cached any more
        self._priority = np.zeros(max_requests, np.int64)

    def attach_host_tier(self, tier: HostTier, mover: PageMover) -> None:
        """From now on evicted pages go to ``tier`` and come back from it, moved by ``mover``.

        Raises:
            ConfigError: not a tier and a mover, or the tier's pages are of another size.
        """
        if not isinstance(tier, HostTier) or not all(callable(getattr(mover, name, None)) for name in MOVES):
            raise ConfigError(
                f"cannot attach a {type(tier).__name__} moved by a {type(mover).__name__}: they must be a HostTier and "
                f"what has {', '.join(MOVES)}, see PageMover"
            )
        if tier.page_format.page_size != self.page_size:
            raise ConfigError(
                f"the host tier has pages of {tier.page_format.page_size} tokens and the pool of {self.page_size}; "
                "both must be equal"
            )
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

        None is for now: it is let in once others have ended. What can never be let in is refused.

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
            ConfigError: ``scope`` is not a CacheScope.
            ShapeError: there are no tokens, or more than a row can hold; a number is not an integer.
            RequestTooLarge: the whole pool is too small for the tokens, or for ``most_tokens``.
            Exception: what the host tier or the mover raises; nothing is admitted then.
        """
        self.caller.enter()
        tokens, level = token_vector(token_ids), priority_level(priority)
        most = self._checked_most(checked_scope(scope) and tokens.size, most_tokens)
        if not self.page_table.available_rows:
            return None
        row = found = None
        pages, counted = NO_PAGES, self.prefix and (self.prefix.query_tokens, self.prefix.hit_tokens)
        try:
            if self.prefix:
                found = self.prefix.match(scope, tokens)
                self.prefix.lock(found)
                pages = found.pages
            if not self._has_room(tokens.size, most, pages.size):
                self._take_back(None, [found], NO_PAGES)
                return None
            row = self.page_table.alloc_row()
            self._known[row], self._most[row], self._priority[row] = tokens.size, most, level
            if found:
                self._locked[row] = found
            self.allocator.retain(pages)
            self.page_table.append_pages(row, pages)
            loaded = self._load(row, scope, tokens) if self.host else 0
            if self.prefix and found and counts_hit:
                self.prefix.record(found)  # a hit only now that the row is there
            return Admission(row, pages.size * self.page_size, loaded * self.page_size)
        except BaseException:  # an interrupt too: the caller never learns of this row
            self._take_back(row, [found], pages)
            if self.prefix and counted:
                self.prefix.query_tokens, self.prefix.hit_tokens = counted
            raise

    def cached_tokens(self, scope: CacheScope, token_ids: Int32) -> int:
        """How many of a request's tokens ``admit`` would find on the device now; changes nothing."""
        return self.prefix.match(scope, token_ids).num_tokens if self.prefix else 0

    def locked_pages(self, row: int) -> int:
        """Cached pages that a row keeps from eviction; raises ShapeError where it is not in use."""
        self.page_table.kv_len(row)
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
        self.page_table.check_unchanged(growth)  # before anything is evicted or taken
        self._make_room(growth.num_pages)
        clock = self.allocator.clock
        try:
            self.page_table.grow(growth, self.allocator.alloc_pages(growth.fresh))
        except BaseException:
            self.allocator.give_back_since(clock)
            raise

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
        self.caller.enter()
        rows.check_unchanged()  # before anything is evicted or taken
        beginning = rows.beginning()
        self._make_room(beginning.size)
        clock = self.allocator.clock
        try:
            rows.grow(beginning, self.allocator.alloc_single_pages(beginning.size))
        except BaseException:
            self.allocator.give_back_since(clock)
            raise

    def can_fork(self, row: int, tokens: int) -> bool:
        """Whether ``fork`` keeps the rule by which ``admit`` lets in; raises ShapeError as ``fork``."""
        self._check_fork(row, tokens)
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
        self.caller.enter()
        self._check_fork(row, tokens)
        full, rest = divmod(tokens, self.page_size)
        pages, new_row, match = self.page_table.row_pages(row), None, self._locked.get(row)
        try:
            new_row = self.page_table.alloc_row()
            self._known[new_row] = tokens + 1
            for each in (self._most, self._priority, self._is_forgotten):
                each[new_row] = each[row]
            if self.prefix and match:
                self.prefix.lock(match)  # once more: a handle may be shared
                self._locked[new_row] = match
            self.allocator.retain(pages[:full])
            self.page_table.append_pages(new_row, pages[:full])
            if rest:
                self.grow(np.array([new_row], np.int32), np.array([rest], np.int64))
            return new_row, pages[full : full + bool(rest)].copy(), self.page_table.row_pages(new_row)[full:]
        except BaseException:  # an interrupt too: the caller never learns of this row
            self._take_back(new_row, [match], pages[:full])
            raise

    def publish(self, row: int, scope: CacheScope, token_ids: Int32) -> None:
        """Offers the full pages of a running row to the prefix cache.

        Args:
            row: of a running request.
            scope: under which its keys and values may be shared.
            token_ids: the tokens that the row's slots hold, int32 ``[n]``; what exceeds the row is ignored.
        """
        self.caller.enter()
        tokens, pages = self._full_pages(row, token_ids)
        if self.prefix is None or self._is_forgotten[row]:
            return
        sharing = self._sharing(row, pages)
        try:
            self._advance([*sharing, (row, pages.size)], scope, tokens, pages)
        except BaseException:
            if sharing:  # who shares pages that are cached now must have its lock on them
                self._advance([*sharing, (row, pages.size)], scope, tokens, pages)
            raise

    def release(self, row: int, scope: CacheScope, token_ids: Int32) -> None:
        """Gives back a row and its pages, also where it raises; the full ones stay in the prefix cache.

        Raises:
            DoubleFreeError: no request has this row.
            Exception: what the prefix cache raises; then they do not stay.
        """
        self.caller.enter()
        if not self.page_table.is_in_use(row):
            self.page_table.release(row)  # which refuses it
        held, match = NO_PAGES, None
        try:
            held, match = self.page_table.row_pages(row), self._locked.get(row)
            if self.prefix and match and not self._is_forgotten[row]:
                tokens, pages = self._full_pages(row, token_ids)
                self._advance(self._sharing(row, pages), scope, tokens, pages)
                self.prefix.finish(match, scope, tokens, pages, priority=int(self._priority[row]))
            elif self.prefix and match:
                self.prefix.unlock(match)
            self._locked.pop(row, None)
            self.allocator.release(self.page_table.release(row))
            self._known[row], self._is_forgotten[row] = 0, False
        except BaseException:
            self._take_back(row, [match], held)
            raise

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix, on the device and on the host.

        Running requests keep their pages, and none of these is cached later: what was computed before is not found.
        """
        self.caller.enter()
        try:
            self._forget()
        except BaseException:
            self._forget()  # to the end: half of it would cache again what was to be forgotten
            raise

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

    def _checked_most(self, known: int, most_tokens: int | None) -> int:
        """The most tokens of a request that knows so many; refuses what has no place or never will."""
        context = self.page_table.max_context_tokens
        if not 1 <= known <= context:
            raise ShapeError(f"cannot admit {known} tokens: a request has from 1 to {context}")
        most = context if most_tokens is None else min(whole_number("most_tokens", most_tokens, least=1), context)
        needed = known if most_tokens is None else max(known, most)
        if needed > self.size:
            raise RequestTooLarge(
                f"cannot admit a request of {known} tokens that may need {needed}: the whole pool holds {self.size}; "
                "ask for fewer tokens or raise size",
                requested=self.round_up(needed),
                available=self.size,
            )
        return min(most, self.size)

    def _check_fork(self, row: int, tokens: int) -> None:
        held = self.page_table.kv_len(row)
        if whole_number("tokens", tokens) > held:
            raise ShapeError(f"cannot fork {tokens} tokens of row {row}: it holds {held}")

    def _full_pages(self, row: int, token_ids: Int32) -> tuple[Int32, Int32]:
        """A row's full pages as far as their tokens are told: these tokens, and the pages."""
        tokens = token_vector(token_ids)
        pages = self.page_table.full_pages(row, tokens.size)
        return tokens[: pages.size * self.page_size], pages

    def _sharing(self, row: int, pages: Int32) -> list[tuple[int, int]]:
        """Who else holds pages that a row is about to have cached, as after a fork, each with how many from the first.

        They are to lock them as the row does: a page that is cached, held and not locked counts as evictable, and
        evicting it frees nothing.
        """
        known = self._locked[row].num_tokens // self.page_size
        if known >= pages.size or self.allocator.ref_count(pages[known : known + 1])[0] == 1:
            return []
        sharing = self.page_table.rows_that_share(row, pages, known)
        return [each for each in sharing if self._locked[each[0]].num_tokens < each[1] * self.page_size]

    def _advance(self, rows: list[tuple[int, int]], scope: CacheScope, tokens: Int32, pages: Int32) -> None:
        """Has the first so many pages cached for each row, which moves its lock to their end."""
        for row, count in rows if self.prefix else ():
            mine, priority = tokens[: count * self.page_size], int(self._priority[row])
            self._locked[row] = self.prefix.advance(self._locked[row], scope, mine, pages[:count], priority=priority)

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
            self._known[row], self._is_forgotten[row] = 0, False
        kept = list(self._locked.values())
        for match in matches:
            while self.prefix and match and match.locks > kept.count(match):
                self.prefix.unlock(match)
        held = np.concatenate([self.page_table.held_pages(), self.prefix.pages() if self.prefix else NO_PAGES])
        distinct = np.unique(pages)
        surplus = self.allocator.ref_count(distinct) - np.bincount(held, minlength=self.size + 1)[distinct]
        self.allocator.release(np.repeat(distinct, surplus.clip(min=0)))

    def _forget(self) -> None:
        self._is_forgotten[self._known > 0] = True
        if self.prefix:
            self.prefix.reset()
        if self.host:
            self.host.tier.reset()

    def _load(self, row: int, scope: CacheScope, token_ids: Int32) -> int:
        """Brings back from the host what follows the row's tokens there; returns the pages."""
        if self.host is None:
            return 0
        wanted = token_ids[:-1]
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
