"""The memory of running requests: joins the row table, the page pool, the prefix cache and the host tier.

    admit          prefix found → its pages locked and shared → the rest promised → a row
    grow           cached pages are evicted where pages are short → the pool hands out pages → the row grows
    mark_computed  a step has run: notes how many tokens of each row are computed
    publish        full pages of computed tokens enter the prefix cache, for requests that begin alike
    leave_behind   pages wholly behind a window go back
    truncate       a row gives back the pages of its last tokens
    release        the row's references go back; what the prefix cache holds stays until it is evicted
    take_moves     the copies of pages that the device must make before the next step

One heap of pages serves all groups of layers: a page belongs to one group at a time, and what one group does not need,
another takes. Every page is free, held by rows, cached, or both held and cached; a page returns to the pool when its
last holder releases it. Rows hold pages, the prefix cache holds pages, and a row locks those that both hold. Nothing
else holds any; so after a fault a row can be ended by what rows, leases and prefix cache list, in any state of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, KVPoolExhausted, ShapeError
from engine.layer_groups import first_kept_page
from engine.memory.admission import Admission, checked_most, pages_to_admit
from engine.memory.integers import Int32, positive_option, priority_level, whole_number
from engine.memory.offload import HostTier, Pages
from engine.memory.page_moves import PageCopy, PageLoad, PageMove
from engine.memory.pages import NO_PAGES, PagedTokenToKVPoolAllocator, PageIds
from engine.memory.prefix import (
    EvictedPages,
    EvictionPolicyName,
    NullPrefixCache,
    PrefixMatch,
    RadixCache,
    checked_scope,
    token_vector,
)
from engine.memory.prefix_search import FoundPrefix, find_on_device, find_prefix
from engine.memory.rows import ReqToTokenPool, RowGrowth
from engine.memory.scope import CacheScope
from engine.planning.page_demand import PageDemand

EVICT_AT_ONCE = 64  # pages, at most a 32nd of the pool


@dataclass(eq=False)
class Lease:
    """The part of the prefix cache that a row uses.

    Attributes:
        match: the locked handle of its cached pages.
        priority: of its pages in the prefix cache, where the policy of eviction reads it.
        was_reset: whether the cache was reset since it was admitted: its pages are not cached any more.
        missed_tokens: tokens that its query of the prefix cache asked for and has not found.
    """

    match: PrefixMatch
    priority: int
    was_reset: bool = False
    missed_tokens: int = 0


class CacheManager:
    """Pages and rows of the running requests, and what is kept of past ones.

    A call that raises has changed nothing, whatever raises in it, with two exceptions: cached pages may have been
    evicted to make room, and ``release`` gives the row back even so. One thread at a time: a call that begins while
    another thread is in one is refused with ConcurrentUse, and so is any call in a fork of the process.

    Pages that a call frees may still be read by steps under way: they are handed out for later steps, whose programs
    the device runs after those, and for page moves, which run in the same order.

    Args:
        size: usable token slots, a multiple of ``page_size``.
        page_size: tokens per page.
        max_requests: rows.
        max_context_tokens: most tokens of one request.
        policy: eviction policy of the prefix cache; None keeps nothing of past requests.
        windows: of each group of layers, the tokens that a query sees, itself included; None is all before it.
        ahead_tokens: the most tokens of a row that are granted and not computed, which bounds what it holds of a
            window; None is as many as a row can have.
        max_events: how many events ``take_events`` of the prefix cache may have to return; 0 keeps none.

    Attributes:
        page_table: the row table.
        allocator: the slot-level face of the page pool.
        demand: how many pages requests take.
        prefix: the prefix cache; one that keeps nothing where ``policy`` is None.
        host_tier: takes evicted pages; None: they are dropped.
    """

    def __init__(
        self,
        size: int,
        page_size: int,
        max_requests: int,
        max_context_tokens: int,
        *,
        policy: EvictionPolicyName | None = "lru",
        windows: Sequence[int | None] = (None,),
        ahead_tokens: int | None = None,
        max_events: int = 0,
    ) -> None:
        self.size = size
        self.page_size = page_size
        self.allocator = PagedTokenToKVPoolAllocator(size, page_size)
        self._pool = self.allocator.pages
        self.page_table = ReqToTokenPool(max_requests, max_context_tokens, page_size, windows)
        ahead = max_context_tokens if ahead_tokens is None else positive_option("ahead_tokens", ahead_tokens)
        self.demand = PageDemand(self.page_table.windows, page_size, ahead)
        self.caller = self.page_table.caller = self.allocator.caller  # one set of books
        self.prefix: RadixCache = (
            NullPrefixCache(self.allocator, self.page_table.windows)
            if policy is None
            else RadixCache(
                self.allocator,
                page_size,
                policy=policy,
                windows=self.page_table.windows,
                on_evict=self._plan_saves,
                max_events=max_events,
            )
        )
        self.host_tier: HostTier | None = None
        self._leases: dict[int, Lease] = {}  # by row
        self._moves: list[PageMove] = []

    def attach_host_tier(self, tier: HostTier) -> None:
        """From now on evicted pages go to ``tier`` and come back from it, by page moves.

        Raises:
            ConfigError: not a tier, or its pages have another size.
        """
        if not isinstance(tier, HostTier):
            raise ConfigError(f"cannot attach a {type(tier).__name__}: it must be a HostTier")
        if tier.page_format.page_size != self.page_size:
            raise ConfigError(
                f"the host tier has pages of {tier.page_format.page_size} tokens and the pool of {self.page_size}; "
                "both must be equal"
            )
        if tier.page_format.windows != self.page_table.windows:
            raise ConfigError(
                f"the host tier has pages of groups with the windows {tier.page_format.windows} and the row table of "
                f"{self.page_table.windows}; both must be equal"
            )
        self.host_tier = tier

    # How much there is.

    @property
    def shares_prefixes(self) -> bool:
        """Whether anything is kept of past requests."""
        return not isinstance(self.prefix, NullPrefixCache)

    @property
    def reclaimable_pages(self) -> int:
        """Pages that could be handed out now: free ones, and cached ones that no row has locked."""
        return self._pool.available + self.prefix.evictable_pages

    @property
    def held_tokens(self) -> int:
        """Tokens in pages that rows hold or have locked: neither free nor evictable."""
        return self.size - self.reclaimable_pages * self.page_size

    def cached_tokens(self, scope: CacheScope, token_ids: Int32) -> int:
        """How many of a request's tokens ``admit`` would find on the device now; changes nothing."""
        return self.prefix.match(scope, token_ids).num_tokens

    def locked_pages(self, row: int) -> int:
        """Cached pages that a row keeps from eviction; raises ShapeError where it is not in use."""
        held = self.page_table.pages_by_group(row)
        lease = self._leases.get(row)
        if lease is None:
            return 0
        held = held[:, : lease.match.pages.size]
        return int(np.count_nonzero(self.prefix.is_cached(held[held > 0])))

    # A request's way.

    def admit(
        self,
        scope: CacheScope,
        token_ids: Int32,
        *,
        most_tokens: int | None = None,
        priority: int = 0,
        counts_hit: bool = True,
    ) -> Admission | None:
        """Gives a request a row and the cached pages of its tokens; returns None while there is no room or no row.

        None is for now: the request is admitted once others have ended. One that can never be admitted is refused. The
        rule is that of ``engine.memory.admission``.

        Args:
            scope: scope in which its keys and values may be shared.
            token_ids: its known tokens, int32 ``[n]``; at least the last is always computed.
            most_tokens: most tokens that it can need; None is as many as a row or the pool can hold.
            priority: priority of its pages in the prefix cache, where the eviction policy reads it.
            counts_hit: whether to count a query of the prefix cache; False for a request that was retracted.

        Raises:
            ConfigError: ``scope`` is not a CacheScope.
            ShapeError: there are no tokens, or more than a row can hold; a number is not an integer.
            RequestTooLarge: the whole pool is too small for the tokens, or for ``most_tokens``.
            Exception: what the host tier raises; nothing is admitted then.
        """
        self.caller.enter()
        tokens, level = token_vector(token_ids), priority_level(priority)
        checked_scope(scope)
        most = checked_most(self.page_table, self.demand, self.size, tokens.size, most_tokens)
        if not self.page_table.available_rows:
            return None
        row, locked = None, list[PrefixMatch | None]()
        pages, counted, planned = NO_PAGES, (self.prefix.query_tokens, self.prefix.hit_tokens), len(self._moves)
        try:
            plan = self._lock_found(scope, tokens, most, locked)
            if plan is None:
                return None
            found, data = plan
            row = self.page_table.alloc_row(known=tokens.size, most=most)
            self._leases[row] = Lease(found.match, level)
            pages = PageIds(found.pages[found.pages > 0])
            self._retain(pages)
            loads = self._load(row, found, data)
            if counts_hit:
                self.prefix.record(found.match)  # a hit only now that the row is there
                self._leases[row].missed_tokens = found.match.num_queried - found.match.num_tokens
            self._moves += loads
            cached = self.page_table.computed_len(row)
            return Admission(row, cached, self.page_table.kv_len(row) - cached)
        except BaseException:  # an interrupt too: the caller never learns of this row
            self._moves[planned:] = [move for move in self._moves[planned:] if not isinstance(move, PageLoad)]
            self._undo_row(row, locked, pages)
            self.prefix.query_tokens, self.prefix.hit_tokens = counted
            raise

    def share(self, row: int, scope: CacheScope, token_ids: Int32, *, counts_hit: bool = True) -> int:
        """Extends a row that was admitted by cached pages that follow its tokens.

        For a request that waits for another one to compute what both begin with.

        Args:
            row: row of a request that has been granted only cached tokens.
            scope: as for ``admit``.
            token_ids: as for ``admit``.
            counts_hit: as for ``admit``.

        Returns:
            The tokens that it need not compute now; 0 where it has computed tokens of its own.

        Raises:
            ConfigError, ShapeError: as for ``admit``; not a row in use.
        """
        self.caller.enter()
        before, lease = self.page_table.kv_len(row), self._lease(row)
        found = find_on_device(self.prefix, scope, token_vector(token_ids))
        match = found.match
        goes_on = np.array_equal(match.pages[: lease.match.pages.size], lease.match.pages)  # not after a reset
        if match.num_tokens > before == lease.match.num_tokens and goes_on and not lease.was_reset:
            hits, missed = self.prefix.hit_tokens, lease.missed_tokens
            counted = min(match.num_tokens - before, missed) * counts_hit  # no token that was not asked for
            try:
                self._extend_lease(row, lease, found)
            finally:
                if lease.match is match:
                    self.prefix.hit_tokens, lease.missed_tokens = hits + counted, missed - counted
        return self.page_table.kv_len(row) - before

    def has_room_to_grow(self, rows: npt.ArrayLike, counts: npt.ArrayLike) -> bool:
        """Whether ``grow`` would find the pages, by eviction if need be; raises ShapeError where it has to look."""
        if isinstance(rows, np.ndarray) and rows.dtype.kind == "i" and isinstance(counts, int | np.ndarray):
            tokens = rows.size * counts if isinstance(counts, int) else int(counts.sum())
            most = (rows.size + tokens // self.page_size) * self.page_table.num_groups  # each last page may be full
            if most <= self._pool.available:
                return True
        return self.page_table.plan_growth(rows, counts).num_pages <= self.reclaimable_pages

    def grow(self, rows: npt.ArrayLike, counts: npt.ArrayLike) -> None:
        """Gives each row pages for ``counts`` more tokens. All rows or none.

        Args:
            rows: ``[B]`` distinct rows in use.
            counts: ``[B]`` new tokens, 0 or more; or one number for every row.

        Raises:
            ShapeError: a row is not in use or listed twice, would exceed the context, or a count is missing or
                negative.
            KVPoolExhausted: too few pages are free or evictable.
        """
        self.caller.enter()
        growth = self.page_table.plan_growth(rows, counts)
        if growth.num_pages:
            self._grow_by_pages(growth)
        else:
            self.page_table.grow(growth, NO_PAGES)

    def _grow_by_pages(self, growth: RowGrowth) -> None:
        """Grows rows as planned, by fresh pages, for which cached ones are evicted where need be."""
        groups = self.page_table.num_groups
        self._make_room(growth.num_pages, f"{groups} groups of {growth.num_pages // groups} each" if groups > 1 else "")
        clock = self._pool.clock
        try:
            self.page_table.grow(growth, self._take_for(growth))
        except BaseException:
            self._pool.give_back_since(clock)
            raise

    def truncate(self, row: int, tokens: int) -> None:
        """Shrinks a row to its first ``tokens`` tokens, as when speculation is rejected; pages return to the pool.

        A shared page is never written: where the row ends within one, it gets a page of its own, and a PageCopy is
        planned. Cached pages beyond its new end are no longer locked.

        Raises:
            ShapeError: not a row in use, it has fewer tokens, or its window has left behind what it would see.
            KVPoolExhausted: no page is free or evictable for the copy.
        """
        self.caller.enter()
        length, last = self.page_table.kv_len(row), self.page_table.check_truncation(row, tokens) // self.page_size
        before = self.page_table.pages_by_group(row)
        ends_within = tokens % self.page_size > 0 and tokens < length
        shared = np.flatnonzero(self._pool.ref_count(before[:, last]) > 1) if ends_within else NO_PAGES
        sources = before[shared, last] if shared.size else NO_PAGES
        self._make_room(sources.size, f"a copy of the last pages of row {row}")
        clock, targets = self._pool.clock, NO_PAGES
        try:
            last_pages = np.zeros(self.page_table.num_groups, np.int32)
            if sources.size:
                targets = self._pool.take_singles(sources.size)
                last_pages[shared] = targets
            dropped = self.page_table.truncate(row, tokens, last_pages)
            if sources.size:
                self._moves.append(PageCopy(sources, targets))
            self._release(dropped)
            self._shorten_lease(row, tokens)
        except BaseException:
            if self.page_table.kv_len(row) == length:
                self._pool.give_back_since(clock)
            else:  # finish the change
                planned = any(isinstance(move, PageCopy) and move.targets is targets for move in self._moves)
                self._moves += [PageCopy(sources, targets)] * (sources.size > 0 and not planned)
                self._release_surplus(before[before > 0])
                self._shorten_lease(row, tokens)
            raise

    def mark_computed(self, rows: npt.ArrayLike, tokens: npt.ArrayLike) -> None:
        """Notes that a step has run, and the page moves before it: the first ``tokens[i]`` of ``rows[i]`` are computed.

        Only computed tokens are published and released into the prefix cache.

        Raises:
            ShapeError: not distinct rows in use, or a row has been granted fewer tokens.
        """
        self.page_table.mark_computed(rows, tokens)

    def leave_behind(self, rows: npt.ArrayLike) -> None:
        """Gives back the pages of rows that lie wholly behind a window, as far as tokens are computed.

        No step under way reads them. Called once a step has been booked and its pages are published, so that these may
        stay cached; does nothing where no group has a window.

        Raises:
            ShapeError: not distinct rows in use.
        """
        if not self.page_table.has_windows:
            return
        self.caller.enter()
        pages = NO_PAGES
        try:
            pages = self.page_table.leave_behind(rows)
            self._release(pages)
        except BaseException:
            self._release_surplus(pages)
            raise

    def publish(self, row: int, scope: CacheScope, token_ids: Int32) -> None:
        """Offers the full pages of a running row to the prefix cache.

        Where the cache has pages of these tokens already the row takes those and gives its own back;
        ``ReqToTokenPool.take_new_pages`` then has their ids for the device's copy of the table.

        Args:
            row: row of a running request.
            scope: scope in which its keys and values may be shared.
            token_ids: the tokens that the row's slots hold, int32 ``[n]``; what is not computed yet is ignored.
        """
        self.caller.enter()
        tokens, pages = self._full_pages(row, token_ids)
        lease = self._lease(row)
        if not lease.was_reset and tokens.size >= lease.match.num_tokens:
            self._advance([*self._sharing(row, pages), (row, pages.shape[1])], scope, tokens, pages)

    def can_fork(self, row: int, tokens: int) -> bool:
        """Whether ``fork`` keeps the rule of admission now; raises ShapeError where it is not a row in use."""
        known, computed = whole_number("tokens", tokens), self.page_table.computed_len(row)
        if not self.page_table.available_rows or known > computed:
            return False
        shared = self._fork_pages(row, known)
        return shared is not None and self._has_room(known + 1, self._most_of(row), PageIds(shared[shared > 0]))

    def fork(self, row: int, tokens: int) -> int:
        """Gives a new row the first ``tokens`` tokens of ``row``.

        Full pages are shared; the copy of the partial last one is planned as a page move.

        Returns:
            The new row.

        Raises:
            ShapeError: ``row`` has fewer computed tokens, or a window has left behind what the next token would see.
            KVPoolExhausted: there is no row, or no page for the partial one.
        """
        self.caller.enter()
        computed = self.page_table.computed_len(row)
        if whole_number("tokens", tokens) > computed:
            raise ShapeError(f"cannot fork {tokens} tokens of row {row}: {computed} are computed")
        full, rest = divmod(tokens, self.page_size)
        shared = self._fork_pages(row, tokens)
        if shared is None:
            raise ShapeError(
                f"cannot fork {tokens} tokens of row {row}: a window has left behind pages that the next token would "
                f"see; fork where the row ends, at {computed} tokens"
            )
        pages, new_row, lease = self.page_table.pages_by_group(row), None, self._lease(row)
        taken = PageIds(shared[shared > 0])
        copies: list[PageMove] = []
        try:
            new_row = self.page_table.alloc_row(known=tokens + 1, most=self._most_of(row))
            self.prefix.lock(lease.match)  # once more: a handle may be shared
            self._leases[new_row] = Lease(lease.match, lease.priority, lease.was_reset)
            self._shorten_lease(new_row, tokens)
            self._retain(taken)
            self.page_table.append_pages(new_row, shared, goes_on_at=tokens)
            if rest:
                self.grow(np.array([new_row], np.int32), np.array([rest], np.int64))
                self.page_table.mark_computed([new_row], [tokens])
                copies.append(PageCopy(pages[:, full], self.page_table.pages_by_group(new_row)[:, full]))
            self._moves += copies
            return new_row
        except BaseException:  # an interrupt too: the caller never learns of this row
            self._moves = [move for move in self._moves if move not in copies]
            self._undo_row(new_row, [lease.match], taken)
            raise

    def release(self, row: int, scope: CacheScope, token_ids: Int32) -> None:
        """Gives back a row and its pages, also where it raises; full pages of computed tokens stay in the prefix cache.

        Args:
            row: row of a running request.
            scope: see ``publish``.
            token_ids: see ``publish``.

        Raises:
            DoubleFreeError: no request has this row.
            Exception: what the prefix cache raises; then they do not stay.
        """
        self.caller.enter()
        if not self.page_table.is_in_use(row):
            self.page_table.release(row)  # which refuses it
        held, match = NO_PAGES, None
        try:
            listed, lease = self.page_table.pages_by_group(row), self._lease(row)
            held, match = PageIds(listed[listed > 0]), lease.match
            tokens, pages = self._full_pages(row, token_ids)
            if lease.was_reset or tokens.size < match.num_tokens:
                self.prefix.unlock(match)
            else:
                self._advance(self._sharing(row, pages), scope, tokens, pages)
                self.prefix.finish(match, scope, tokens, pages, priority=lease.priority)
            self._leases.pop(row, None)
            self._release(self.page_table.release(row))
        except BaseException:
            self._undo_row(row, [match], held)
            raise

    def take_moves(self) -> list[PageMove]:
        """The page moves that were planned since the last call, to be made in this order before the next step."""
        self.caller.enter()
        moves = self._moves
        try:
            self._moves = []
            return moves
        except BaseException:
            self._moves = moves
            raise

    # Reset.

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix, on the device and on the host.

        Running requests keep their pages, and none of these is cached later: what was computed before is not found.
        EvictedPages that ``take_moves`` has returned and that are not in the host tier yet are for the caller to drop.
        """
        self.caller.enter()
        try:
            self._forget()
        except BaseException:
            self._forget()  # finish the change: half of it would cache again what was to be forgotten
            raise

    def clear(self) -> None:
        """Takes every row and every page back and forgets every prefix, in any state of the books.

        For a caller that continues after a fault. It happens in place, and no counter is reset: rows, slots and matches
        from before are refused. The host tier keeps its pages where its own books are sound.
        """
        self.caller.enter()
        self.page_table.clear()
        self.prefix.clear()
        self.allocator.clear()
        self._leases.clear()
        self._moves = []
        if self.host_tier and not self.host_tier.is_sound():
            self.host_tier.clear()

    def check_integrity(self) -> None:
        """Proves that rows and prefix cache together hold exactly what the page pool says; else IntegrityError."""
        self.page_table.check_integrity()
        self.prefix.check_integrity()
        if self.host_tier:
            self.host_tier.check_integrity()
        self.allocator.check_integrity(np.concatenate([self.page_table.held_pages(), self.prefix.pages()]))

    def _lease(self, row: int) -> Lease:
        lease = self._leases.get(row)
        if lease is None:
            raise ShapeError(f"row {row} was not given out by admit or fork; only such rows are published and released")
        return lease

    def _most_of(self, row: int) -> int:
        return int(self.page_table.request_lens(np.array([row])).most[0])

    def _has_room(self, known: int, most: int, shared: PageIds) -> bool:
        """Whether the rule of admission holds with one more request, which shares pages whose entries are locked."""
        reclaimable = self._pool.available + self.prefix.evictable_without(shared)
        return pages_to_admit(self.page_table, self.demand, known, most, shared.size) <= reclaimable

    def _retain(self, pages: PageIds) -> None:
        """Takes a reference to each page for a row."""
        self._pool.retain(pages)
        self.prefix.note_holders(pages)

    def _release(self, pages: PageIds) -> None:
        """Gives back a row's reference to each page."""
        self._pool.release(pages)
        self.prefix.note_holders(pages)

    def _make_room(self, pages: int, purpose: str = "") -> None:
        free = self._pool.available
        short = pages - free
        if short <= 0:
            return
        evictable = self.prefix.evictable_pages
        if short > evictable:
            what, total = f" for {purpose}" if purpose else "", self.size // self.page_size
            raise KVPoolExhausted(
                f"cannot allocate {pages} pages{what}: {free} free and {evictable} evictable of {total}; lower "
                "max_running_requests or raise max_total_tokens",
                requested=pages * self.page_size,
                available=(free + evictable) * self.page_size,
            )
        # More than is short where the pool is large: a call costs more than a page, and decoding asks for few.
        self.prefix.evict(min(max(short, min(EVICT_AT_ONCE, self.size // self.page_size // 32)), evictable))

    def _take_for(self, growth: RowGrowth) -> PageIds:
        """Fresh pages for rows: neighbours for a row that begins several."""
        return self._pool.take_singles(growth.num_pages) if growth.runs is None else self._pool.take(growth.runs)

    def _full_pages(self, row: int, token_ids: Int32) -> tuple[Int32, Int32]:
        """The tokens of a row's full pages, as far as they are computed and ``token_ids`` has them.

        And the pages, int32 ``[groups, n]``.
        """
        tokens = token_vector(token_ids)
        pages = self.page_table.full_pages(row, tokens.size)
        return tokens[: pages.shape[1] * self.page_size], pages

    def _fork_pages(self, row: int, tokens: int) -> Int32 | None:
        """The full pages of a row that a fork after ``tokens`` tokens shares, ``[groups, n]``, 0 behind a window.

        None where the row does not hold every page that it would see any more.
        """
        table, full = self.page_table, tokens // self.page_size
        pages = table.pages_by_group(row)
        for group, window in enumerate(table.windows):
            if window is not None:
                first = first_kept_page(window, tokens, self.page_size)
                pages[group, :first] = 0
                if not pages[group, first : -(-tokens // self.page_size)].all():
                    return None
        return pages[:, :full]

    def _sharing(self, row: int, pages: Int32) -> list[tuple[int, int]]:
        """Other rows that hold pages which a row is about to have cached, as after a fork, each with how many.

        They are to lock them as the row does: a page that is cached, held and not locked counts as evictable, and
        evicting it frees nothing.
        """
        known, first = self._leases[row].match.num_tokens // self.page_size, pages[0]
        if self.page_table.windows[0] is not None:  # pages of windows need no lock: whoever holds them protects them
            return []
        if known >= first.size or self._pool.ref_count(first[known : known + 1])[0] == 1:
            return []
        sharing = self.page_table.rows_that_share(row, first, known)
        return [each for each in sharing if self._leases[each[0]].match.num_tokens < each[1] * self.page_size]

    def _advance(self, rows: list[tuple[int, int]], scope: CacheScope, tokens: Int32, pages: Int32) -> None:
        """Has the first so many pages cached for each row, which moves its lock to their end."""
        try:
            self._advance_each(rows, scope, tokens, pages)
        except BaseException:
            # To the end: what one row has cached, each row that holds it must lock, and hold the cached pages.
            if any(self._leases[row].match.num_tokens >= count * self.page_size for row, count in rows):
                self._advance_each(rows, scope, tokens, pages)
            raise

    def _advance_each(self, rows: list[tuple[int, int]], scope: CacheScope, tokens: Int32, pages: Int32) -> None:
        for row, count in rows:
            mine, lease = tokens[: count * self.page_size], self._leases[row]
            lease.match = self.prefix.advance(lease.match, scope, mine, pages[:, :count], priority=lease.priority)
            self._take_cached_pages(row, self.prefix.pages_of(lease.match))

    def _take_cached_pages(self, row: int, cached: Int32) -> None:
        """Puts cached pages, ``[groups, n]``, in place of a row's own with the same contents, and gives these back."""
        own = self.page_table.pages_by_group(row)[:, : cached.shape[1]]
        cached = cached[:, : own.shape[1]]
        groups, columns = ((own != cached) & (own > 0) & (cached > 0)).nonzero()
        if not columns.size:
            return
        try:
            taken = PageIds(cached[groups, columns])
            self._retain(taken)
            self._release(self.page_table.replace_pages(row, groups, columns, taken))
        except BaseException:
            self._release_surplus(np.concatenate([own[own > 0], cached[cached > 0]]))
            raise

    def _extend_lease(self, row: int, lease: Lease, found: FoundPrefix) -> None:
        """Lets a row that holds the cached pages of its lease hold those of a longer match instead."""
        before, held = lease.match, self.page_table.pages_by_group(row)
        pages = found.pages[:, before.pages.size :]
        added = PageIds(pages[pages > 0])
        try:
            self.prefix.lock(found.match)
            self._retain(added)
            left = [self.page_table.append_pages(row, pages), self.page_table.leave_behind(np.array([row]))]
            lease.match = found.match
            self._release(PageIds(np.concatenate(left)))
            self.prefix.unlock(before)
        except BaseException:
            if self.page_table.kv_len(row) == before.num_tokens:
                self._unlock_unleased([found.match])
            else:  # finish the change
                lease.match = found.match
                self._unlock_unleased([before])
            self._release_surplus(np.concatenate([added, held[held > 0]]))
            raise

    def _shorten_lease(self, row: int, tokens: int) -> None:
        """Lets a row lock no more than its own full pages: a locked page is one that it holds."""
        lease = self._leases.get(row)
        if lease is not None:
            lease.match = self.prefix.shorten(lease.match, tokens)

    def _lock_found(
        self, scope: CacheScope, tokens: Int32, most: int, locked: list[PrefixMatch | None]
    ) -> tuple[FoundPrefix, list[Pages]] | None:
        """Finds and locks what a request need not compute; None where there is no room for the request.

        Args:
            scope: as for ``admit``.
            tokens: as for ``admit``.
            most: the most tokens that it can have.
            locked: gets each match before it is locked.

        Returns:
            What was found, and the contents of what is to be loaded.
        """
        tier = self.host_tier
        for found in (find_prefix(self.prefix, tier, scope, tokens), find_on_device(self.prefix, scope, tokens)):
            locked.append(found.match)
            self.prefix.lock(found.match)
            if not self._has_room(tokens.size, most, PageIds(found.pages[found.pages > 0])):
                self.prefix.unlock(found.match)
                return None
            data = [
                tier.get(scope, tokens[: load.stop * self.page_size], load.start, group=load.group)
                for load in found.loads
                if tier
            ]
            if all(len(each) == load.stop - load.start for load, each in zip(found.loads, data, strict=True)):
                return found, data
            self.prefix.unlock(found.match)  # a page was damaged on the host: without it
        return None

    def _load(self, row: int, found: FoundPrefix, data: list[Pages]) -> list[PageMove]:
        """Gives a fresh row the pages that were found, and fresh ones for those that are loaded into them."""
        counts = [load.stop - load.start for load in found.loads]
        self._make_room(sum(counts))
        clock, fresh, device = self._pool.clock, None, found.pages.shape[1]
        pages = np.zeros((self.page_table.num_groups, found.num_pages), np.int32)
        pages[:, :device] = found.pages
        try:
            fresh = self._pool.take(counts)
            parts = np.split(fresh, np.cumsum(counts)[:-1]) if counts else []
            for load, mine in zip(found.loads, parts, strict=True):
                pages[load.group, load.start : load.stop] = mine
            computed = min([device, *(load.start for load in found.loads)])  # a window's pages may be loaded before
            self.page_table.append_pages(row, pages, computed=computed)
            return [PageLoad(mine, contents) for mine, contents in zip(parts, data, strict=True)]
        except BaseException:
            if fresh is None:
                self._pool.give_back_since(clock)
            else:
                self._release_surplus(fresh)
            raise

    def _plan_saves(self, evicted: list[EvictedPages]) -> None:
        if self.host_tier:
            self._moves += evicted

    def _forget(self) -> None:
        for lease in self._leases.values():
            lease.was_reset = True
        self._moves = [move for move in self._moves if not isinstance(move, EvictedPages)]
        self.prefix.reset()
        if self.host_tier:
            self.host_tier.reset()

    def _undo_row(self, row: int | None, matches: list[PrefixMatch | None], pages: Int32) -> None:
        """Ends a row, as far as it was begun or not ended yet: its locks, its pages, what is known of its request.

        Args:
            row: the row; None where there is none yet.
            matches: matches to unlock, except for the locks of other rows.
            pages: pages to release, except for the references of other rows and of the prefix cache.
        """
        if row is not None:
            lease = self._leases.pop(row, None)
            matches = [*matches, lease.match if lease else None]
            if self.page_table.is_in_use(row):
                pages = np.concatenate([pages, self.page_table.release(row)])
        self._unlock_unleased(matches)
        self._release_surplus(pages)

    def _unlock_unleased(self, matches: list[PrefixMatch | None]) -> None:
        """Takes back the locks of matches that no row has."""
        kept = [lease.match for lease in self._leases.values()]
        for match in matches:
            while match and match.locks > kept.count(match):
                self.prefix.unlock(match)

    def _release_surplus(self, pages: Int32) -> None:
        """Gives back the references of pages that neither a row nor the prefix cache lists."""
        listed = np.concatenate([self.page_table.held_pages(), self.prefix.pages()])
        distinct = np.unique(pages)
        holders = np.bincount(listed, minlength=self.size // self.page_size + 1)[distinct]
        surplus = (self._pool.ref_count(distinct) - holders).clip(min=0)
        self._pool.release(PageIds(np.repeat(distinct, surplus)))
        self.prefix.note_holders(distinct)
