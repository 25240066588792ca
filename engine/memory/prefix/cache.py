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

from engine.errors import ConfigError, DoubleFreeError, IntegrityError, ShapeError
from engine.memory.integers import Bool, Int32, priority_level, read_only, whole_number
from engine.memory.pages import NO_PAGES, PagedTokenToKVPoolAllocator, PageIds
from engine.memory.prefix.match import (
    EvictedPages,
    PrefixMatch,
    checked_scope,
    token_vector,
    whole_pages,
)
from engine.memory.prefix.tree import PrefixForest, RadixNode, RadixTree, joined
from engine.memory.scope import CacheScope

EvictionPolicyName = Literal["lru", "lfu", "priority"]

# What an insertion changed: a node, its tokens and pages before, and the tokens of the child that it got.
Insertion = tuple[RadixNode, Int32, Int32, Int32]


class RadixCache:
    """Keeps full pages of past sequences for requests with the same beginning.

    The cache is a holder of its pages, like the requests: ``insert`` retains, eviction and ``reset`` release, and no
    call takes a reference of the caller's. Every page is cached at most once, under one prefix of one scope. Tokens are
    always compared, never a hash alone.

    A page is *protected* while a locked handle covers it, else *evictable*. Evicting a page that a running request
    also holds frees nothing, so a request that holds cached pages keeps them locked.

    A call that raises has changed nothing: it takes back the facts that it changed, and the forest derives the rest
    anew (see ``PrefixForest``).

    Args:
        allocator: its pool counts the references.
        page_size: tokens per page, the allocator's.
        policy: which pages are evicted first. "lru": those unused for longest. "lfu": those hit least (counted up to
            255), of equals the least recently used. "priority": those inserted with the lowest priority, likewise.
            A use of a page is a use of the prefix before it.
        on_evict: called with pages just before they are released, so that their contents can be saved; not with pages
            that have become unreachable. An error in it comes out of ``evict``, which is complete by then.

    Attributes:
        query_tokens, hit_tokens: tokens that recorded matches asked for and found.
        evicted_pages: pages that ``evict`` has released.

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
        if not isinstance(allocator, PagedTokenToKVPoolAllocator):
            raise ConfigError(
                f"allocator is a {type(allocator).__name__}; it must be a PagedTokenToKVPoolAllocator, as in "
                "RadixCache(allocator, page_size)"
            )
        if page_size != allocator.page_size:
            raise ConfigError(
                f"page_size is {page_size!r} tokens here and {allocator.page_size} in the allocator; they must be equal"
            )
        self.allocator = allocator
        self.caller = allocator.caller
        self.page_size = page_size
        self.policy = policy
        self.query_tokens = 0
        self.hit_tokens = 0
        self.evicted_pages = 0
        self._pool = allocator.pages
        self._on_evict = on_evict
        self._start_with(PrefixForest(page_size))

    def _start_with(self, forest: PrefixForest) -> None:
        is_cached: Bool = np.zeros(self._pool.num_pages + 2, np.bool_)  # the last entry is no page's
        self._locked: dict[PrefixMatch, None] = {}  # the matches that hold locks
        self._forest, self._is_cached = forest, is_cached

    @property
    def evictable_pages(self) -> int:
        """Cached pages that ``evict`` could release now."""
        return self._forest.evictable

    @property
    def protected_pages(self) -> int:
        """Cached pages under a lock."""
        return self._forest.protected

    @property
    def cached_pages(self) -> int:
        """Pages that the cache holds, evictable and protected."""
        return self._forest.evictable + self._forest.protected

    def is_cached(self, pages: npt.ArrayLike) -> Bool:
        """Which of some pages of the pool the cache holds; bool ``[n]``.

        Raises:
            ShapeError: not an integer vector, or a page outside of the pool.
        """
        self._pool.ref_count(pages)
        return self._is_cached[np.asarray(pages, np.int64)]

    def pages(self) -> PageIds:
        """Every cached page; ``[cached_pages]``, in no promised order, a fresh array."""
        runs = [node.pages for tree in self._forest.trees() for node in tree.nodes()]
        return PageIds(np.concatenate([NO_PAGES, *runs]))

    def runs(self) -> Iterator[tuple[CacheScope, Int32, Int32]]:
        """Every page that can be found, as ``PrefixForest.runs``; nothing may change in the meantime."""
        return self._forest.runs()

    def match(self, scope: CacheScope, token_ids: npt.ArrayLike, *, whole: bool = False) -> PrefixMatch:
        """Finds the longest cached prefix in whole pages.

        The last token does not count, so that one is left to compute: of 2 pages of tokens the first page is found.
        Changes nothing: neither the order of eviction nor a counter. The next call may evict what was found, unless it
        is locked.

        Args:
            scope: must be equal to the scope it was inserted under.
            token_ids: int32 ``[n]``. Other integers work but cost a conversion, a list more than the search itself.
            whole: whether the last token counts too: of 2 pages of tokens both pages are found.

        Raises:
            ConfigError: ``scope`` is not a CacheScope.
            ShapeError: ``token_ids`` is not a vector of integers within int32.
        """
        tokens = token_vector(token_ids)
        tree = self._forest.find(checked_scope(scope))
        if tree is None:
            return PrefixMatch(NO_PAGES, 0, tokens.size, self._forest, None)
        most = (tokens.size if whole else max(tokens.size - 1, 0)) // self.page_size
        walk = tree.walk(tokens[: most * self.page_size])
        pages = PageIds(joined(walk.runs)) if walk.runs else NO_PAGES
        return PrefixMatch(pages, walk.num_pages * self.page_size, tokens.size, self._forest, walk.node)

    def lock(self, match: PrefixMatch) -> None:
        """Protects the pages of a match from eviction, once more if they are already; undone by ``unlock``.

        The owner of a locked handle may lock it again also when its pages cannot be found any more.

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
                self._forest.lock(node)
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
                self._forest.use(node, counts_hit=self.policy == "lfu")
            self.query_tokens, self.hit_tokens = before[0] + match.num_queried, before[1] + match.num_tokens
        except BaseException:
            self.query_tokens, self.hit_tokens = before
            self._mend()
            raise

    def insert(self, scope: CacheScope, token_ids: npt.ArrayLike, pages: npt.ArrayLike, *, priority: int = 0) -> int:
        """Caches the full pages of a sequence.

        The last token counts: of 2 pages of tokens both are cached. A partial last page is left out. The cache becomes
        one more holder of the pages that were not cached yet; the caller keeps every reference it has, also to its
        duplicates of cached pages. Where the weights have been replaced since the scope was made, nothing is cached.

        Args:
            scope: scope in which the pages were computed.
            token_ids: int32 ``[n]``.
            pages: int32 ``[n // page_size]``, held by the caller, in the order of the tokens.
            priority: higher stays longer; only the policy "priority" reads it.

        Returns:
            How many tokens were cached already.

        Raises:
            ConfigError: ``scope`` is not a CacheScope.
            ShapeError: arrays of a wrong shape or dtype; a page that has no holder, is listed twice, or is cached
                already as something else.
        """
        self.caller.enter()
        tokens, page_ids = whole_pages(token_ids, pages, self.page_size)
        level = priority_level(priority)
        done: list[Insertion] = []
        if not self._accepts(scope):
            return 0
        try:
            _, known, _ = self._enter(scope, tokens, page_ids, level, None, done)
            return known * self.page_size
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
        """Inserts what a request has computed since then and moves its lock to the end of it.

        The same as ``insert``, ``lock`` of all of it, and one ``unlock`` of ``match``, in one walk from the end of
        ``match``. Where the weights have been replaced since the scope was made, nothing changes.

        Args:
            match: the request's locked handle.
            scope: see ``insert``, also for the next arguments.
            token_ids: all tokens of the sequence from its start.
            pages: all of its full pages.
            priority: priority of the pages that are new to the cache.

        Returns:
            The locked handle from now on; ``match`` itself where nothing changes. Its ``pages`` are the cached pages
            of all full pages of tokens, in order; where one of ``pages`` is a duplicate, the page cached first.

        Raises:
            ConfigError, ShapeError: as for ``insert``.
            DoubleFreeError: as for ``unlock``.
        """
        self._require_locked(match)
        tokens, page_ids = whole_pages(token_ids, pages, self.page_size)
        level, before = priority_level(priority), {match: match.locks}
        done: list[Insertion] = []
        if not self._accepts(scope):
            return match
        try:
            runs, known, node = self._enter(scope, tokens, page_ids, level, match, done)
            cached = PageIds(joined([*runs, page_ids[known:]]))
            held = PrefixMatch(cached, tokens.size, tokens.size, self._forest, node)
            before[held] = 0
            self._forest.move_lock(match.node, node)
            self._locked[held] = None
            match.locks, held.locks = match.locks - 1, 1
            if not match.locks:
                del self._locked[match]
            return held
        except BaseException:
            self._undo(before, done)
            raise

    def shorten(self, match: PrefixMatch, num_tokens: int) -> PrefixMatch:
        """Moves a request's lock from the end of a match back to an earlier place, where its own pages end.

        The same as ``lock`` of the beginning of ``match`` and one ``unlock`` of ``match``, also where the pages cannot
        be found any more.

        Args:
            match: the request's locked handle.
            num_tokens: tokens that it keeps; their whole pages stay locked.

        Returns:
            The locked handle from now on; ``match`` itself where it is no longer than that.

        Raises:
            DoubleFreeError: as for ``unlock``.
        """
        self._require_locked(match)
        kept, before = num_tokens // self.page_size, {match: match.locks}
        node = match.node
        if kept >= match.pages.size or node is None:
            return match
        try:
            while node.parent is not None and node.start >= kept:
                node = node.parent
            node = self._forest.ending_at(node, kept)
            held = PrefixMatch(PageIds(match.pages[:kept]), kept * self.page_size, num_tokens, self._forest, node)
            before[held] = 0
            self._forest.lock(node)
            self._locked[held] = None
            held.locks = 1
            self._unlock(match)
            return held
        except BaseException:
            self._undo(before, [])
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
            if self._accepts(scope):
                self._enter(scope, tokens, page_ids, level, match, done)
            self._unlock(match)
        except BaseException:
            self._undo({match: locks}, done)
            raise

    def evict(self, num_pages: int) -> int:
        """Releases evictable pages in the order of the policy, ends of sequences first.

        The cost per page is constant, however much is cached. Pages that a weights epoch has invalidated go first.

        Args:
            num_pages: how many to release; all evictable ones where there are fewer.

        Returns:
            How many were released. They are free now, except where they have another holder.

        Raises:
            ShapeError: ``num_pages`` is not an integer, or negative.
        """
        self.caller.enter()
        if type(num_pages) is not int or num_pages < 0:
            num_pages = whole_number("cannot evict: num_pages", num_pages)
        forest = self._forest
        wanted = left = min(num_pages, forest.evictable)
        evicted, is_told = self.evicted_pages + wanted, False
        runs: list[Int32] = []
        told: list[EvictedPages] = []
        cut: list[tuple[RadixNode, Int32, Int32]] = []  # each leaf with what it had
        try:
            while left:
                leaf = forest.oldest()
                count = min(left, leaf.pages.size)
                prefix = None if self._on_evict is None or leaf.tree.order.is_retired else leaf.tree.prefix_tokens(leaf)
                cut.append((leaf, leaf.tokens, leaf.pages))
                runs.append(forest.cut(leaf, count))
                if prefix is not None:
                    first, pages = prefix.size // self.page_size - count, PageIds(read_only(runs[-1].copy()))
                    told.append(EvictedPages(leaf.tree.scope, read_only(prefix), first, pages))
                left -= count
            is_told = True  # from here on the change is completed even where something raises
            if self._on_evict is not None and told:
                self._on_evict(told)
            self._give_back(runs)
            self.evicted_pages = evicted
            return wanted
        except BaseException:
            if is_told:
                self.evicted_pages = evicted
            else:
                for leaf, tokens, leaf_pages in reversed(cut):
                    forest.put_back(leaf, tokens, leaf_pages)
            self._mend()
            raise

    def reset(self, scope: CacheScope | None = None) -> int:
        """Empties the cache, of one scope or completely; ``on_evict`` is not called.

        Protected pages can no longer be found either; they stay protected until they are unlocked, and are then the
        first to be evicted.

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
        except BaseException:  # completes the change
            self._mend()
            self._drop(trees)
            raise

    def raise_weights_epoch(self, model: str, epoch: int) -> None:
        """Invalidates at once all pages computed with a model's weights before ``epoch``.

        They cannot be found or inserted any more, nor locked except through a handle that is locked already, and are
        evicted before any other; the cost does not depend on how many there are.

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

    def clear(self) -> None:
        """Forgets everything, in any state of the cache; ``allocator.clear`` ends its references.

        Every match from before is refused from now on. Weights epochs and counters stay.
        """
        self.caller.enter()
        self._start_with(self._forest.empty())

    def check_integrity(self) -> None:
        """Proves that trees, locks, eviction order, counters and the allocator agree; visits every node.

        Raises:
            IntegrityError: they do not; the message names the page or the counter.
        """
        self._forest.check_integrity()
        self._pool.check_integrity()
        times = np.bincount(self.pages(), minlength=self._is_cached.size)
        held = self._pool.ref_count(np.arange(times.size - 1)) > 0
        wrong = times != self._is_cached
        wrong[:-1] |= (times[:-1] > 0) & ~held
        if wrong.any():
            page = int(wrong.argmax())
            raise IntegrityError(
                f"page {page} is {times[page]} times in the prefix trees, {'' if self._is_cached[page] else 'not '}"
                f"marked as cached and {'' if held[page] else 'not '}held in the allocator; a cached page is in the "
                "trees once, marked and held; this is a bug, report it"
            )

    def _accepts(self, scope: CacheScope) -> bool:
        """Whether entries of a scope may be added; raises ConfigError where it is not a scope."""
        return self._forest.accepts(checked_scope(scope))

    def _enter(
        self,
        scope: CacheScope,
        tokens: Int32,
        page_ids: PageIds,
        priority: int,
        after: PrefixMatch | None,
        done: list[Insertion],
    ) -> tuple[list[Int32], int, RadixNode | None]:
        """Inserts whole pages.

        The search begins where ``after``, a locked match of the beginning, ends. A node that it alone keeps is
        lengthened under its lock: a sequence that grows by chunks is one node. ``done`` gets what ``_undo`` needs.

        Returns:
            The pages that were cached already, int32, in runs; how many they are; the node at the end of all pages.
        """
        level = priority if self.policy == "priority" else 0
        forest = self._forest
        tree, start = forest.find(scope), None
        if tree is None:
            if not page_ids.size:
                return [], 0, None
            tree = forest.plant(scope)
        elif after is not None and after.node is not None:
            start = tree.resume(after.node, after.num_tokens // self.page_size, tokens)
        walk = tree.walk(tokens, start)
        known, end = walk.num_pages, walk.node
        if known < page_ids.size:
            fresh, rest = page_ids[known:], tokens[known * self.page_size :]
            self._keep(fresh)
            end = forest.ending_at(end, known)
            if end is start and end.may_extend(level):
                done.append((end, end.tokens, end.pages, NO_PAGES))
                forest.extend(end, rest, fresh)
            else:
                done.append((end, end.tokens, end.pages, rest))
                end = forest.attach(end, rest, fresh, level)
        else:
            end = forest.ending_at(end, known)  # what lies beyond was not used
        # A leaf just attached to ``start``, which is the root or locked with all above it, stands in order already.
        if start is None or walk.node is not start or self.policy == "priority":
            forest.use(end, least_level=level)
        return walk.runs if start is None or after is None else [after.pages, *walk.runs], known, end

    def _keep(self, pages: Int32) -> None:
        """Takes a reference of pages that are to be cached.

        Raises:
            ShapeError: a page is cached already, is listed twice, or has no holder.
        """
        # A number that is no page clips to an entry that is never set; the pool refuses it.
        index = pages.astype(np.int64)  # as which an array is indexed at a fifth of the cost
        cached = self._is_cached.take(index, mode="clip")
        if cached.any():
            raise ShapeError(
                f"cannot cache page {pages[cached.argmax()]}: it is cached already, as other tokens or in another "
                "scope; insert a page under the tokens that it was computed from"
            )
        listed = pages.tolist()
        if len(set(listed)) != len(listed):
            twice = next(page for at, page in enumerate(listed) if page in listed[:at])
            raise ShapeError(f"cannot cache page {twice}: it is listed twice, a page holds the tokens of one place")
        is_retained = False
        try:
            # In one statement, so that no fault falls between the call and the record of it.
            is_retained = self._pool.retain(PageIds(pages), are_distinct=True) is None  # type: ignore[func-returns-value]
            self._is_cached[index] = True
        except BaseException:
            if is_retained:
                self._is_cached[index] = False
                self._pool.release(PageIds(pages))
            raise

    def _give_back(self, runs: list[Int32]) -> None:
        """Gives back the references of pages that were cached."""
        if not runs:
            return
        pages = runs[0] if len(runs) == 1 else np.concatenate(runs)
        is_released = False
        try:
            if pages.size == 1:  # at a fifth of the cost
                page = pages.item()
                is_released = self._pool.release_one(page) is None  # type: ignore[func-returns-value]
                self._is_cached[page] = False
            else:
                is_released = self._pool.release(PageIds(pages)) is None  # type: ignore[func-returns-value]
                self._is_cached[pages] = False
        except BaseException:
            if is_released:
                self._is_cached[pages] = False
            raise

    def _drop(self, trees: list[RadixTree]) -> None:
        self._give_back([run for tree in trees for run in self._forest.drop(tree)])

    def _unlock(self, match: PrefixMatch) -> None:
        match.locks -= 1
        if not match.locks:
            del self._locked[match]
        if match.node is not None:
            self._forest.unlock(match.node)

    def _undo(self, locks: dict[PrefixMatch, int], done: list[Insertion]) -> None:
        """Takes back what a call changed before it raised: the locks of matches, and what it inserted."""
        for match, count in locks.items():
            match.locks = count
            self._locked[match] = None
        for insertion in done:
            self._forest.undo_insertion(*insertion)
        self._mend()

    def _mend(self) -> None:
        """Derives the rest again, and releases pages that are in no tree."""
        self._locked = {match: None for match in self._locked if match.locks}
        self._forest.mend((match.node, match.locks) for match in self._locked)
        is_kept = np.zeros_like(self._is_cached)
        is_kept[self.pages()] = True
        lost = (self._is_cached & ~is_kept).nonzero()[0].astype(np.int32)
        if lost.size:
            self._give_back([lost])

    def _require_locked(self, match: PrefixMatch) -> None:
        self.caller.enter()
        if getattr(match, "owner", None) is not self._forest or match.locks == 0:
            raise DoubleFreeError(
                f"cannot unlock {_name_of(match)}: it holds no lock of this cache; unlock once per lock, through the "
                "handle that was locked"
            )

    def _require_current(self, match: PrefixMatch) -> RadixNode | None:
        """The node around the end of a match; refuses a match that is out of date. A locked match never is."""
        self.caller.enter()
        is_mine = getattr(match, "owner", None) is self._forest
        if is_mine and match.locks:
            return match.node
        node = match.node if is_mine else None
        end = match.num_tokens // self.page_size if is_mine else 0
        while node is not None and node.parent is not None and node.start >= end:
            node = node.parent
        gone = node is not None and (not node.attached or node.end < end or (end and node.tree.order.is_retired))
        if not is_mine or gone:
            raise DoubleFreeError(
                f"cannot use {_name_of(match)}: it is of another cache, or some of its pages were evicted or "
                "invalidated since; lock a match before anything else is done, or match again"
            )
        return node

    def _settle(self, match: PrefixMatch, node: RadixNode | None) -> RadixNode | None:
        """Makes a match's node end where the match does, by a split if need be."""
        if not match.locks and node is not None:
            node = self._forest.ending_at(node, match.num_tokens // self.page_size)
        match.node = node
        return node


def _name_of(match: object) -> str:
    return f"a match of {match.num_tokens} tokens" if isinstance(match, PrefixMatch) else f"a {type(match).__name__}"
