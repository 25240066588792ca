"""Bugs as they are made, each planted into the shipped code by replacing a function; the small scopes find each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from engine.memory import prefix_search
from engine.memory.manager import CacheManager
from engine.memory.pages import PageIds
from engine.memory.prefix import RadixCache
from engine.memory.rows import ReqToTokenPool
from engine.serving.plan.prefix_waits import PrefixWaits
from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.replica import Replica

MonkeyPatch = pytest.MonkeyPatch
Plant = Callable[[MonkeyPatch], None]


def forgotten_unlock(patch: MonkeyPatch) -> None:
    """A request that ends leaves its pages locked: nothing evicts them any more."""
    finish = RadixCache.finish

    def leaves_locked(self: Any, match: Any, *arguments: Any, **options: Any) -> None:
        self.lock(match)
        finish(self, match, *arguments, **options)

    patch.setattr(RadixCache, "finish", leaves_locked)


def partial_page_counts_as_full(patch: MonkeyPatch) -> None:
    """Pages are rounded up where they are to be rounded down: a page that is still written to is cached."""

    def rounds_up(self: Any, row: int, tokens: int) -> Any:
        pages = -(-min(self.computed_len(row), tokens) // self.page_size)
        return self._table[row, :, :pages].copy()

    def knows_all(self: Any, row: int, token_ids: Any) -> Any:
        pages = self.page_table.full_pages(row, token_ids.size)
        tokens = np.resize(token_ids, pages.shape[1] * self.page_size).astype(np.int32)
        return tokens, pages

    patch.setattr(ReqToTokenPool, "full_pages", rounds_up)
    patch.setattr(CacheManager, "_full_pages", knows_all)


def released_twice(patch: MonkeyPatch) -> None:
    """A row that shrinks gives its pages back once itself and once through its caller."""
    truncate = ReqToTokenPool.truncate

    def lists_twice(self: Any, *arguments: Any) -> Any:
        pages = truncate(self, *arguments)
        return PageIds(np.concatenate([pages, pages]))

    patch.setattr(ReqToTokenPool, "truncate", lists_twice)


def window_one_token_short(patch: MonkeyPatch) -> None:
    """A page leaves with its window one token too early."""
    leave_behind = ReqToTokenPool.leave_behind

    def counts_one_more(self: Any, rows: Any) -> Any:
        index = np.array(rows, np.int64)
        before = self._computed[index].copy()
        self._computed[index] += before > 0
        pages = leave_behind(self, rows)
        self._computed[index] = before
        return pages

    patch.setattr(ReqToTokenPool, "leave_behind", counts_one_more)


def last_token_counts_as_cached(patch: MonkeyPatch) -> None:
    """A prompt that is cached as a whole leaves no token to compute."""
    match = RadixCache.match
    patch.setattr(RadixCache, "match", lambda self, scope, tokens, **_: match(self, scope, tokens, whole=True))


def granted_counts_as_computed(patch: MonkeyPatch) -> None:
    """Tokens that have slots are published before a step has run."""

    def granted(self: Any, row: int, tokens: int) -> Any:
        return self._table[row, :, : min(self.kv_len(row), tokens) // self.page_size].copy()

    patch.setattr(ReqToTokenPool, "full_pages", granted)


def cut_shares_its_last_page(patch: MonkeyPatch) -> None:
    """A row that is cut within a shared page goes on writing there."""

    def without_copy(self: Any, row: int, tokens: int) -> None:
        self._release(self.page_table.truncate(row, tokens))
        self._shorten_lease(row, tokens)

    patch.setattr(CacheManager, "truncate", without_copy)


def cut_keeps_its_lock(patch: MonkeyPatch) -> None:
    """A row that is cut keeps pages from eviction that it does not hold any more."""
    patch.setattr(CacheManager, "_shorten_lease", lambda self, row, tokens: None)


def reset_forgets_running_rows(patch: MonkeyPatch) -> None:
    """What a row computed before a reset is cached after it."""

    def forgets(self: Any) -> None:
        self.prefix.reset()
        if self.host_tier:
            self.host_tier.reset()

    patch.setattr(CacheManager, "_forget", forgets)


def old_weights_are_accepted(patch: MonkeyPatch) -> None:
    """What old weights have computed is cached after they were replaced."""
    patch.setattr(RadixCache, "_accepts", lambda self, scope: True)


def tier_brings_the_last_token(patch: MonkeyPatch) -> None:
    """The search of the host tier forgets that one token must be left: prompts of whole pages come back complete."""
    find = prefix_search.find_prefix

    def whole(prefix: Any, tier: Any, scope: Any, tokens: Any) -> Any:
        return find(
            prefix, tier, scope, np.append(tokens, np.int32(0)) if tier is not None and tier.holds(scope) else tokens
        )

    patch.setattr("engine.memory.manager.find_prefix", whole)


def device_is_not_told(patch: MonkeyPatch) -> None:
    """A row takes the cached page in place of its own, and the device keeps the old one."""

    def quietly(self: Any, row: int, groups: Any, columns: Any, pages: Any) -> Any:
        before = PageIds(self._table[row, groups, columns])
        self._table[row, groups, columns] = pages
        return before

    patch.setattr(ReqToTokenPool, "replace_pages", quietly)


def stale_mark(patch: MonkeyPatch) -> None:
    """What was put aside for rows that have only grown is used though one of them has changed otherwise."""

    @contextmanager
    def changes_nothing(self: Any, rows: Any) -> Any:
        yield

    patch.setattr(ReqToTokenPool, "_undoing", changes_nothing)


def sibling_does_not_lock(patch: MonkeyPatch) -> None:
    """After a fork one row caches the pages that both hold, and the other one does not lock them."""
    patch.setattr(CacheManager, "_sharing", lambda self, row, pages: [])


def late_token_is_booked(patch: MonkeyPatch) -> None:
    """A request was aborted between dispatch and commit, and its row's next request gets the token."""
    patch.setattr(Replica, "_still_run", lambda self, step: np.ones(step.req_pool_idx.size, np.bool_))


def retracted_goes_to_the_end(patch: MonkeyPatch) -> None:
    """A request that was retracted loses its place in the queue."""

    def at_the_end(self: Any, request: Any) -> None:
        request.wait()
        self.waiting.append(request)

    patch.setattr(RequestQueue, "wait", at_the_end)


def giant_blocks_itself(patch: MonkeyPatch) -> None:
    """What a request may still add is counted without end, so that one which fits alone is never admitted."""
    has_room = CacheManager._has_room
    patch.setattr(
        CacheManager, "_has_room", lambda self, known, most, shared: has_room(self, known + 1, most + 1, shared)
    )


def waits_for_nobody(patch: MonkeyPatch) -> None:
    """A request goes on waiting for a row whose request was aborted."""
    end_waits = PrefixWaits.end_waits

    def waits(self: Any) -> None:
        if all(self._cache.page_table.is_in_use(wait.row) for wait in self._waits.values()):
            end_waits(self)

    patch.setattr(PrefixWaits, "end_waits", waits)


IN_THE_MANAGER: dict[str, list[Plant]] = {
    "rows": [forgotten_unlock, released_twice, last_token_counts_as_cached, device_is_not_told, stale_mark],
    "pages of two": [partial_page_counts_as_full, cut_shares_its_last_page, sibling_does_not_lock, cut_keeps_its_lock],
    "planned steps": [granted_counts_as_computed],
    "windows": [window_one_token_short],
    "host tier": [tier_brings_the_last_token],
    "resets and new weights": [reset_forgets_running_rows, old_weights_are_accepted],
}
IN_THE_SCHEDULER: dict[str, list[Plant]] = {
    "two alike": [late_token_is_booked, waits_for_nobody],
    "short of pages": [retracted_goes_to_the_end],
    "chunks": [giant_blocks_itself],
}
