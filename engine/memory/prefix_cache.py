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

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, DoubleFreeError
from engine.memory.cached_pages import CachedPages
from engine.memory.integers import Bool, Int32, Int64, whole_count
from engine.memory.node_ledger import NodeLedger
from engine.memory.page_allocator import PagedTokenToKVPoolAllocator
from engine.memory.prefix_forest import PrefixForest
from engine.memory.prefix_match import EvictedPages, PrefixMatch, checked_scope, token_vector, whole_pages
from engine.memory.radix_tree import NO_PAGES, RadixNode, joined
from engine.memory.scope import CacheScope

EvictionPolicyName = Literal["lru", "lfu", "priority"]


class RadixCache:
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
        ConfigError: ``page_size`` is not the allocator's, or the policy is unknown.
    """

    def __init__(
        self,
        allocator: PagedTokenToKVPoolAllocator,
        page_size: int,
        *,
        policy: EvictionPolicyName = "lru",
        on_evict: Callable[[list[EvictedPages]], None] | None = None,
    ) -> None:
        if page_size != allocator.page_size:
            raise ConfigError(
                f"page_size is {page_size} tokens here and {allocator.page_size} in the allocator; they must be equal"
            )
        if policy not in get_args(EvictionPolicyName):
            raise ConfigError(f"eviction policy {policy!r} is unknown; use one of {get_args(EvictionPolicyName)}")
        self.allocator = allocator
        self.page_size = page_size
        self.policy = policy
        self.query_tokens = 0
        self.hit_tokens = 0
        self.evicted_pages = 0
        self._on_evict = on_evict
        self._start_with(PrefixForest(page_size))

    @property
    def evictable_pages(self) -> int:
        """Cached pages that ``evict`` could release now."""
        return self._nodes.evictable

    @property
    def protected_pages(self) -> int:
        """Cached pages under a lock."""
        return self._nodes.protected

    @property
    def cached_pages(self) -> int:
        """Pages that the cache holds, evictable and protected."""
        return self._nodes.evictable + self._nodes.protected

    def match(self, scope: CacheScope, token_ids: npt.ArrayLike) -> PrefixMatch:
        """Finds the longest cached prefix in whole pages, one token short of the sequence at most.

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
        node = self._node_of(match)
        match.locks += 1
        if node is not None:
            self._nodes.lock(node)

    def unlock(self, match: PrefixMatch) -> None:
        """Takes back one ``lock`` of this handle; the pages count as used just now.

        Raises:
            DoubleFreeError: the handle is of another cache or holds no lock.
        """
        self._require_locked(match)
        match.locks -= 1
        if match.node is not None:
            self._nodes.unlock(match.node)

    def record(self, match: PrefixMatch) -> None:
        """Counts a match as a query, and as a hit of its tokens; for when the allocation for its request succeeded.

        Raises:
            DoubleFreeError: as for ``lock``.
        """
        node = self._node_of(match)
        self.query_tokens += match.num_queried
        self.hit_tokens += match.num_tokens
        if node is not None and not node.tree.order.is_retired:
            self._nodes.use(node, counts_hit=self.policy == "lfu")

    def insert(self, scope: CacheScope, token_ids: npt.ArrayLike, pages: npt.ArrayLike, *, priority: int = 0) -> int:
        """Caches the full pages of a sequence; a partial last page is left out.

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
        tokens, page_ids = whole_pages(token_ids, pages, self.page_size)
        if not self._forest.accepts(checked_scope(scope)):
            return 0
        return self._enter(scope, tokens, page_ids, priority).num_tokens

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
        if not self._forest.accepts(checked_scope(scope)):
            return match
        held = self._enter(scope, tokens, page_ids, priority, match)
        known = held.num_tokens // self.page_size
        if known < page_ids.size:
            held.pages = joined([held.pages, page_ids[known:].astype(np.int32)])
            held.num_tokens = tokens.size
        self._nodes.move_lock(match.node, held.node)
        match.locks -= 1
        held.locks = 1
        return held

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

        The arguments are those of ``advance``.

        Raises:
            ConfigError, ShapeError: as for ``insert``; the lock stays.
            DoubleFreeError: as for ``unlock``.
        """
        self._require_locked(match)
        tokens, page_ids = whole_pages(token_ids, pages, self.page_size)
        if self._forest.accepts(checked_scope(scope)):
            self._enter(scope, tokens, page_ids, priority, match)
        self.unlock(match)

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
        wanted = left = min(whole_count("evict pages", num_pages), self._nodes.evictable)
        runs: list[Int32] = []
        told: list[EvictedPages] = []
        while left:
            leaf = self._nodes.next_leaf()
            count = min(left, leaf.pages.size)
            prefix = None if self._on_evict is None or leaf.tree.order.is_retired else leaf.tree.prefix_tokens(leaf)
            runs.append(self._nodes.cut(leaf, count))
            if prefix is not None:
                told.append(EvictedPages(leaf.tree.scope, prefix, prefix.size // self.page_size - count, runs[-1]))
            left -= count
        try:
            if self._on_evict is not None and told:
                self._on_evict(told)
        finally:
            self._pages.remove(runs)
            self.evicted_pages += wanted
        return wanted

    def reset(self, scope: CacheScope | None = None) -> int:
        """Empties the cache, of one scope or altogether; ``on_evict`` is not told.

        Protected pages can no longer be found either; they stay, and count as protected, until they are unlocked, and
        are then the first to be evicted.

        Returns:
            How many pages were released.
        """
        trees = [tree for tree in self._forest.trees() if scope is None or tree.scope == checked_scope(scope)]
        runs = [run for tree in trees for run in self._nodes.drop(tree)]
        self._pages.remove(runs)
        return sum(run.size for run in runs)

    def clear(self) -> None:
        """Forgets everything, whatever state the books are in; the references are for ``allocator.clear`` to end.

        Every match from before is refused from now on. Weights epochs and counters stay.
        """
        self._start_with(self._forest.empty())

    def raise_weights_epoch(self, model: str, epoch: int) -> None:
        """Invalidates at once all that was computed with a model's weights before ``epoch``.

        It cannot be found or inserted any more, nor locked but by who has a lock of it, and is evicted before anything
        else; the cost does not depend on how much there is.

        Raises:
            ConfigError: the model is at a later epoch already.
        """
        self._forest.raise_epoch(model, epoch)

    def is_cached(self, pages: Int32) -> Bool:
        """Which of some pages of the pool the cache holds; bool ``[n]``."""
        return self._pages.holds(pages)

    def pages(self) -> Int32:
        """Every cached page; int32 ``[cached_pages]``, in no promised order."""
        runs = [node.pages for tree in self._forest.trees() for node in tree.nodes()]
        return np.concatenate([np.empty(0, np.int32), *runs])

    def check_integrity(self) -> None:
        """Proves that trees, locks, eviction order, counters and the allocator agree; visits everything.

        Raises:
            IntegrityError: says what is wrong, with the page where it is one.
        """
        self._nodes.check_integrity()
        self._pages.check_integrity([node.pages for tree in self._forest.trees() for node in tree.nodes()])

    def _start_with(self, forest: PrefixForest) -> None:
        self._forest = forest
        self._nodes = NodeLedger(forest)
        self._pages = CachedPages(self.allocator)

    def _enter(
        self, scope: CacheScope, tokens: Int32, page_ids: Int64, priority: int, after: PrefixMatch | None = None
    ) -> PrefixMatch:
        """Inserts whole pages; says what was cached already, with the node at the end of them all.

        The search begins where ``after``, a locked match of the beginning, ends. What it alone keeps is lengthened
        under its lock: a sequence that grows by chunks is one node.
        """
        level = priority if self.policy == "priority" else 0
        tree = self._forest.find(scope)
        start = None
        if tree is not None and after is not None and after.node is not None:
            start = tree.resume(after.node, after.num_tokens // self.page_size, tokens)
        walk = None if tree is None else tree.walk(tokens, start)
        known = 0 if walk is None else walk.num_pages
        node = end_of_walk = None if walk is None else walk.node
        if known < page_ids.size:
            self._pages.add(page_ids[known:])
            end = self._forest.plant(scope).root if node is None else self._nodes.ending_at(node, known)
            fresh, rest = page_ids[known:].astype(np.int32), tokens[known * self.page_size :]
            if end is start and self._nodes.may_extend(end, level):
                self._nodes.extend(end, rest, fresh)
                node = end
            else:
                node = self._nodes.attach(end, rest, fresh, level)
        elif node is not None:
            node = self._nodes.ending_at(node, known)  # what lies beyond was not used
        # What was attached to ``start``, which is the root or locked with all above it, stands in order already.
        if node is not None and (start is None or end_of_walk is not start or self.policy == "priority"):
            self._nodes.use(node, least_level=level)
        pages = NO_PAGES if walk is None else walk.pages
        if start is not None and after is not None:
            pages = joined([after.pages[: start.end], pages])
        return PrefixMatch(pages, known * self.page_size, tokens.size, self._forest, node)

    def _require_locked(self, match: PrefixMatch) -> None:
        if match.owner is not self._forest or match.locks == 0:
            raise DoubleFreeError(
                f"cannot unlock a match of {match.num_tokens} tokens: it holds no lock of this cache; unlock once per "
                "lock, through the handle that was locked"
            )

    def _node_of(self, match: PrefixMatch) -> RadixNode | None:
        return match.node if match.locks and match.owner is self._forest else self._settle(match)

    def _settle(self, match: PrefixMatch) -> RadixNode | None:
        """The node that ends where the match does, split off if need be; refuses a match that is out of date."""
        end, node = match.num_tokens // self.page_size, match.node
        while node is not None and node.parent is not None and node.start >= end:
            node = node.parent
        gone = node is not None and (not node.attached or node.end < end or (end and node.tree.order.is_retired))
        if match.owner is not self._forest or gone:
            raise DoubleFreeError(
                f"cannot use a match of {match.num_tokens} tokens: it is of another cache, or some of its pages were "
                "evicted or invalidated since; lock a match before anything else is done, or match again"
            )
        if node is not None and node.end > end:
            node = self._nodes.ending_at(node, end)
        match.node = node
        return node
