"""Joins allocator, page table, prefix cache and host tier: what a request's memory goes through.

    admit     prefix found → its pages locked and shared → the rest promised → a page-table row
    grow      evicts what is short → the allocator hands out slots → the row grows
    publish   full pages enter the prefix cache, so that who begins alike shares them
    release   the row's references go back; what the prefix cache holds stays until it is evicted

Every page is free, held by rows, cached, or both of the last; a page is returned to the allocator when its last holder
lets go.
"""

from __future__ import annotations

import numpy as np

from engine.errors import ShapeError
from engine.memory.admission import Admission
from engine.memory.cache_books import CacheBooks
from engine.memory.decoding_rows import DecodingRows
from engine.memory.integers import Int32, Int64, priority_level, whole_number
from engine.memory.pages import NO_PAGES, PageIds
from engine.memory.prefix.match import checked_scope, token_vector
from engine.memory.row_growth import RowGrowth
from engine.memory.scope import CacheScope


class CacheManager(CacheBooks):
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

        By the rule of ``AdmissionRule``: there must be pages for what it and each that runs will need soon.

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
        checked_scope(scope)
        most = self._rule.checked_most(tokens.size, most_tokens)
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
            self._rule.known[row], self._rule.most[row], self._priority[row] = tokens.size, most, level
            if found:
                self._locked[row] = found
            self.allocator.pages.retain(pages)
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
        clock = self.allocator.pages.clock
        try:
            self.page_table.grow(growth, self.allocator.pages.take(growth.fresh))
        except BaseException:
            self.allocator.pages.give_back_since(clock)
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
        return beginning <= self.allocator.pages.available or beginning <= self.reclaimable_pages

    def grow_decoding(self, rows: DecodingRows) -> None:
        """Gives each row a page where it begins one, and a token more. All rows or none.

        Raises:
            ShapeError: the rows have changed otherwise.
            KVPoolExhausted: too few pages are free or evictable.
        """
        self.caller.enter()
        rows.check_unchanged()  # before anything is evicted or taken
        beginning = rows.beginning()
        if not beginning.size:
            rows.grow(beginning, NO_PAGES)
            return
        self._make_room(beginning.size)
        clock = self.allocator.pages.clock
        try:
            rows.grow(beginning, self.allocator.pages.take_singles(beginning.size))
        except BaseException:
            self.allocator.pages.give_back_since(clock)
            raise

    def can_fork(self, row: int, tokens: int) -> bool:
        """Whether ``fork`` keeps the rule by which ``admit`` lets in; raises ShapeError as ``fork``."""
        self._check_fork(row, tokens)
        has_row = self.page_table.available_rows > 0
        return has_row and self._has_room(tokens + 1, int(self._rule.most[row]), tokens // self.page_size)

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
            self._rule.known[new_row] = tokens + 1
            for each in (self._rule.most, self._priority, self._is_forgotten):
                each[new_row] = each[row]
            if self.prefix and match:
                self.prefix.lock(match)  # once more: a handle may be shared
                self._locked[new_row] = match
            self.allocator.pages.retain(PageIds(pages[:full]))
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
        self._advance([*sharing, (row, pages.size)], scope, tokens, pages)

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
            self.allocator.pages.release(self.page_table.release(row))
            self._rule.known[row], self._is_forgotten[row] = 0, False
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

    def _check_fork(self, row: int, tokens: int) -> None:
        held = self.page_table.kv_len(row)
        if whole_number("tokens", tokens) > held:
            raise ShapeError(f"cannot fork {tokens} tokens of row {row}: it holds {held}")

    def _full_pages(self, row: int, token_ids: Int32) -> tuple[Int32, Int32]:
        """A row's full pages as far as their tokens are told: these tokens, and the pages."""
        tokens = token_vector(token_ids)
        pages = self.page_table.full_pages(row, tokens.size)
        return tokens[: pages.size * self.page_size], pages

    def _forget(self) -> None:
        self._is_forgotten[self._rule.known > 0] = True
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
