"""The prefix cache: pages of sequences that were computed before, found by their tokens.

Prefix sharing through a radix tree with reference-counted locks follows RadixAttention (arXiv 2312.07104).

A request's way:

    found = cache.match(scope, prompt)        # changes nothing
    cache.lock(found)                         # its pages stay
    …                                         # allocate the rest; cache.evict(...) where pages are short
    cache.record(found)                       # a hit, now that the request really runs
    found = cache.advance(found, scope, tokens, pages)   # when pages have become full: the cache takes its references
    cache.finish(found, scope, tokens, pages)            # when the request ends; or cache.unlock(found)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError
from engine.memory.integers import Int32, priority_level, read_only, whole_number
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator
from engine.memory.prefix.books import Insertion, PrefixBooks
from engine.memory.prefix.match import EvictedPages, PrefixMatch, checked_scope, token_vector, whole_pages
from engine.memory.prefix.tree import NO_PAGES, RadixNode, RadixTree, joined
from engine.memory.scope import CacheScope

EvictionPolicyName = Literal["lru", "lfu", "priority"]


class RadixCache(PrefixBooks):
    """Keeps full pages of past sequences for requests that begin alike.

    The cache is a holder of its pages beside the requests: ``insert`` retains, eviction and ``reset`` release, and
    nothing here ever takes a reference of the caller's. Every page is cached at most once, under one prefix of one
    scope. Tokens are always compared, never a hash alone.

    A page is *protected* while a locked handle covers it, else *evictable*. Evicting a page that a running request
    also holds frees nothing, so whoever holds cached pages keeps them locked.

    A refused call changes nothing.

    Args:
        allocator: counts the references.
        page_size: tokens a page, the allocator's.
        policy: what is evicted first. "lru": what was not used for longest. "lfu": what was hit least (counted up to
            255), of equals the least recent. "priority": what was inserted with the lowest priority, likewise. A
            prefix counts as used whenever what follows it is.
        on_evict: told of pages just before they are released, so that their contents can be saved; not of what has
            become unreachable. An error in it comes out of ``evict``, which is complete by then.

    Raises:
        ConfigError: an argument is of a wrong type, ``page_size`` is not the allocator's, or the policy is unknown.
    """

    def __init__(
        self,
        allocator: PagedTokenToKVPoolAllocator,
        page_size: int,
        *,
        policy: EvictionPolicyName = "lru",
        on_evict: Callable[[list[EvictedPages]], None] | None = None,
    ) -> None:
        if policy not in get_args(EvictionPolicyName):
            raise ConfigError(f"eviction policy {policy!r} is unknown; use one of {get_args(EvictionPolicyName)}")
        if on_evict is not None and not callable(on_evict):
            raise ConfigError(f"on_evict is a {type(on_evict).__name__}; it must be a function of evicted pages")
        super().__init__(allocator, page_size, policy == "priority")
        self.policy = policy
        self.query_tokens = 0
        self.hit_tokens = 0
        self.evicted_pages = 0
        self._on_evict = on_evict

    def match(self, scope: CacheScope, token_ids: npt.ArrayLike) -> PrefixMatch:
        """Finds the longest cached prefix in whole pages.

        The last token never counts, so that one is left to compute: of 2 pages of tokens the first page is found.
        Changes nothing: neither the order of eviction nor a counter. What is found may be evicted by the next call,
        unless it is locked.

        Args:
            scope: must be equal to the scope it was inserted under.
            token_ids: int32 ``[n]``. Other integers work but cost a conversion, a list more than the search itself.

        Raises:
            ConfigError: ``scope`` is not a CacheScope.
            ShapeError: ``token_ids`` is not a vector of integers within int32.
        """
        tokens = token_vector(token_ids)
        tree = self._forest.find(checked_scope(scope))
        if tree is None:
            return PrefixMatch(NO_PAGES, 0, tokens.size, self._forest, None)
        most = max(tokens.size - 1, 0) // self.page_size
        walk = tree.walk(tokens[: most * self.page_size])
        return PrefixMatch(walk.pages, walk.num_pages * self.page_size, tokens.size, self._forest, walk.node)

    def lock(self, match: PrefixMatch) -> None:
        """Protects the pages of a match from eviction, once more if they are already; undone by ``unlock``.

        Who holds a lock of the handle may add another also when its pages cannot be found any more.

        Raises:
            DoubleFreeError: the match is of another cache, or not locked and one of its pages has been evicted or
                invalidated since.
        """
        found, locks = self._require_current(match), match.locks
        try:
            node = self._settle(match, found)
            self._locked[match] = None
            match.locks = locks + 1
            if node is not None:
                self._nodes.lock(node)
        except BaseException:
            self._undo({match: locks}, [])
            raise

    def unlock(self, match: PrefixMatch) -> None:
        """Takes back one ``lock`` of this handle; the pages count as used just now.

        Raises:
            DoubleFreeError: the handle is of another cache or holds no lock.
        """
        self._require_locked(match)
        locks = match.locks
        try:
            self._unlock(match)
        except BaseException:
            self._undo({match: locks}, [])
            raise

    def record(self, match: PrefixMatch) -> None:
        """Counts a match as a query, and as a hit of its tokens; for when the allocation for its request succeeded.

        Raises:
            DoubleFreeError: as for ``lock``.
        """
        found, before = self._require_current(match), (self.query_tokens, self.hit_tokens)
        try:
            node = self._settle(match, found)
            if node is not None and not node.tree.order.is_retired:
                self._nodes.use(node, counts_hit=self.policy == "lfu")
            self.query_tokens, self.hit_tokens = before[0] + match.num_queried, before[1] + match.num_tokens
        except BaseException:
            self.query_tokens, self.hit_tokens = before
            self._mend()
            raise

    def insert(self, scope: CacheScope, token_ids: npt.ArrayLike, pages: npt.ArrayLike, *, priority: int = 0) -> int:
        """Caches the full pages of a sequence.

        The last token counts: of 2 pages of tokens both are cached. A partial last page is left out.
        The pages that were not cached yet get the cache as one more holder. The caller keeps every reference it has,
        also to its duplicates of what was cached already, and releases them as ever. Where the weights have been
        replaced since the scope was made, nothing is cached.

        Args:
            scope: under which the pages were computed.
            token_ids: int32 ``[n]``.
            pages: int32 ``[n // page_size]``, held by the caller, in the order of the tokens.
            priority: for the policy "priority"; higher stays longer. Others do not read it.

        Returns:
            How many tokens were cached already.

        Raises:
            ConfigError: ``scope`` is not a CacheScope.
            ShapeError: arrays of a wrong shape or dtype; a page that nobody holds, that is listed twice, or that is
                already cached as something else.
        """
        self.caller.enter()
        tokens, page_ids = whole_pages(token_ids, pages, self.page_size)
        level = priority_level(priority)
        done: list[Insertion] = []
        if not self._forest.accepts(checked_scope(scope)):
            return 0
        try:
            return self._enter(scope, tokens, page_ids, level, None, done).num_tokens
        except BaseException:
            self._undo({}, done)
            raise

    def advance(
        self,
        match: PrefixMatch,
        scope: CacheScope,
        token_ids: npt.ArrayLike,
        pages: npt.ArrayLike,
        *,
        priority: int = 0,
    ) -> PrefixMatch:
        """Inserts what a request has computed meanwhile and moves its lock to the end of it.

        The last token counts, and a partial last page is left out, as in ``insert``.
        The same as ``insert``, ``lock`` of all of it, and one ``unlock`` of ``match``, in one walk from the end of
        ``match``. Where the weights have been replaced since the scope was made, nothing changes.

        Args:
            match: the request's locked handle.
            scope: as for ``insert``.
            token_ids: as for ``insert``.
            pages: as for ``insert``.
            priority: as for ``insert``.

        Returns:
            The locked handle from now on.

        Raises:
            ConfigError, ShapeError: as for ``insert``.
            DoubleFreeError: as for ``unlock``.
        """
        self._require_locked(match)
        tokens, page_ids = whole_pages(token_ids, pages, self.page_size)
        level, before = priority_level(priority), {match: match.locks}
        done: list[Insertion] = []
        if not self._forest.accepts(checked_scope(scope)):
            return match
        try:
            held = self._enter(scope, tokens, page_ids, level, match, done)
            before[held] = 0
            known = held.num_tokens // self.page_size
            if known < page_ids.size:
                held.pages = joined([held.pages, page_ids[known:].astype(np.int32)])
                held.num_tokens = tokens.size
            self._nodes.move_lock(match.node, held.node)
            self._locked[held] = None
            match.locks, held.locks = match.locks - 1, 1
            if not match.locks:
                del self._locked[match]
            return held
        except BaseException:
            self._undo(before, done)
            raise

    def finish(
        self,
        match: PrefixMatch,
        scope: CacheScope,
        token_ids: npt.ArrayLike,
        pages: npt.ArrayLike,
        *,
        priority: int = 0,
    ) -> None:
        """Inserts all that a request has computed and takes back its lock: ``insert`` and ``unlock``, in one walk.

        The last token counts, and a partial last page is left out, as in ``insert``.
        The arguments are those of ``advance``.

        Raises:
            ConfigError, ShapeError: as for ``insert``; the lock stays.
            DoubleFreeError: as for ``unlock``.
        """
        self._require_locked(match)
        tokens, page_ids = whole_pages(token_ids, pages, self.page_size)
        level, locks = priority_level(priority), match.locks
        done: list[Insertion] = []
        try:
            if self._forest.accepts(checked_scope(scope)):
                self._enter(scope, tokens, page_ids, level, match, done)
            self._unlock(match)
        except BaseException:
            self._undo({match: locks}, done)
            raise

    def evict(self, num_pages: int) -> int:
        """Releases evictable pages in the order of the policy, ends of sequences first.

        The cost a page is constant, however much is cached. What the weights epoch has invalidated goes first.

        Args:
            num_pages: how many to release; all evictable ones where there are fewer.

        Returns:
            How many were released. They are free now, except where someone else holds them too.

        Raises:
            ShapeError: ``num_pages`` is not an integer, or negative.
        """
        self.caller.enter()
        if type(num_pages) is not int or num_pages < 0:
            num_pages = whole_number("cannot evict: num_pages", num_pages)
        wanted = left = min(num_pages, self._nodes.evictable)
        evicted, is_told = self.evicted_pages + wanted, False
        runs: list[Int32] = []
        told: list[EvictedPages] = []
        cut: list[tuple[RadixNode, Int32, Int32]] = []  # each leaf with what it had
        try:
            while left:
                leaf = self._nodes.next_leaf()
                count = min(left, leaf.pages.size)
                prefix = None if self._on_evict is None or leaf.tree.order.is_retired else leaf.tree.prefix_tokens(leaf)
                cut.append((leaf, leaf.tokens, leaf.pages))
                runs.append(self._nodes.cut(leaf, count))
                if prefix is not None:
                    first = prefix.size // self.page_size - count
                    told.append(EvictedPages(leaf.tree.scope, read_only(prefix), first, read_only(runs[-1].copy())))
                left -= count
            is_told = True  # from here on it goes on to the end
            if self._on_evict is not None and told:
                self._on_evict(told)
            self._pages.remove(runs)
            self.evicted_pages = evicted
            return wanted
        except BaseException:
            if is_told:
                self.evicted_pages = evicted
            else:
                for leaf, tokens, leaf_pages in reversed(cut):
                    self._nodes.put_back(leaf, tokens, leaf_pages)
            self._mend()
            raise

    def reset(self, scope: CacheScope | None = None) -> int:
        """Empties the cache, of one scope or altogether; ``on_evict`` is not told.

        Protected pages can no longer be found either; they stay, and count as protected, until they are unlocked, and
        are then the first to be evicted.

        Returns:
            How many pages were released.
        """
        self.caller.enter()
        wanted = None if scope is None else checked_scope(scope)
        trees = [tree for tree in self._forest.trees() if wanted is None or tree.scope == wanted]
        before = self.cached_pages
        try:
            self._drop(trees)
            return before - self.cached_pages
        except BaseException:  # it goes on to the end
            self._mend()
            self._drop(trees)
            raise

    def raise_weights_epoch(self, model: str, epoch: int) -> None:
        """Invalidates at once all that was computed with a model's weights before ``epoch``.

        It cannot be found or inserted any more, nor locked but by who has a lock of it, and is evicted before anything
        else; the cost does not depend on how much there is.

        Raises:
            ConfigError: the model is at a later epoch already.
        """
        self.caller.enter()
        self._forest.check_epoch(model, epoch)
        try:
            self._forest.raise_epoch(model, epoch)
        except BaseException:
            self._mend()
            raise

    def runs(self) -> Iterator[tuple[CacheScope, Int32, Int32]]:
        """Every page that can be found, as ``PrefixForest.runs``; nothing may change meanwhile."""
        return self._forest.runs()

    def _drop(self, trees: list[RadixTree]) -> None:
        self._pages.remove([run for tree in trees for run in self._nodes.drop(tree)])

    def _unlock(self, match: PrefixMatch) -> None:
        match.locks -= 1
        if not match.locks:
            del self._locked[match]
        if match.node is not None:
            self._nodes.unlock(match.node)
