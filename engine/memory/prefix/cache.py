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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, DoubleFreeError, IntegrityError, ShapeError
from engine.memory.integers import Bool, Int32, priority_level, read_only, whole_number
from engine.memory.pages import NO_PAGES, PagedTokenToKVPoolAllocator, PageIds
from engine.memory.prefix.entry_pages import EntryPages, IdlePages, runs_of
from engine.memory.prefix.events import CacheEvent, CacheEvents, PrefixesForgotten
from engine.memory.prefix.match import (
    EvictedPages,
    PrefixMatch,
    checked_scope,
    joined_runs,
    token_vector,
    whole_pages,
)
from engine.memory.prefix.tree import PrefixForest, RadixNode, RadixTree, joined
from engine.memory.scope import CacheScope

EvictionPolicyName = Literal["lru", "lfu", "priority"]


@dataclass
class Insertion:
    """What an insertion changed.

    Attributes:
        nodes: nodes, each with its tokens and entries before, and the tokens of the child that it got.
        adopted: where entries are kept, entries ``[n]``, and the pages that they got, ``[groups, n]``.
    """

    nodes: list[tuple[RadixNode, Int32, Int32, Int32]] = field(default_factory=list)
    adopted: list[tuple[EntryPages, Int32, Int32]] = field(default_factory=list)


@dataclass
class Eviction:
    """What an eviction has taken out.

    Attributes:
        pages: the pages, int32, in runs.
        cut: leaves, each with its tokens and entries before.
        emptied: where entries are kept, entries ``[n]``, and the pages that they had, ``[groups, n]``.
        told: what the cache's owner is told.
    """

    pages: list[Int32] = field(default_factory=list)
    cut: list[tuple[RadixNode, Int32, Int32]] = field(default_factory=list)
    emptied: list[tuple[EntryPages, Int32, Int32]] = field(default_factory=list)
    told: list[EvictedPages] = field(default_factory=list)


class RadixCache:
    """Keeps full pages of past sequences for requests with the same beginning.

    The cache is a holder of its pages, like the requests: ``insert`` retains, eviction and ``reset`` release, and no
    call takes a reference of the caller's. Every page is cached at most once, under one prefix of one scope. Tokens are
    always compared, never a hash alone.

    A page is *protected* while a locked handle covers it, else *evictable*. Evicting a page that a running request
    also holds frees nothing, so a request that holds cached pages keeps them locked.

    With several groups of layers the trees are made of entries, which have a page in each group (``EntryPages``). A
    lock covers the entries and their pages of full attention. Pages of windows are protected while a request holds
    them: whoever takes or gives back references to them says so with ``note_holders``. They are evicted by an order of
    their own: cold ones first, then, by level and last use, warm ones or the ends of sequences. With the end of a
    sequence go its pages of all groups.

    A call that raises has changed nothing: it takes back the facts that it changed, and the forest derives the rest
    anew (see ``PrefixForest``).

    Args:
        allocator: its pool counts the references.
        page_size: tokens per page, the allocator's.
        policy: which pages are evicted first. "lru": those unused for longest. "lfu": those hit least (counted up to
            255), of equals the least recently used. "priority": those inserted with the lowest priority, likewise.
            A use of a page is a use of the prefix before it.
        windows: of each group of layers, the tokens that a query sees, itself included; None is all before it, and
            comes first.
        on_evict: called with pages just before they are released, so that their contents can be saved; not with pages
            that have become unreachable, and not with cold ones. An error in it comes out of ``evict``, which is
            complete by then.
        max_events: how many events ``take_events`` may have to return; 0 keeps none.

    Attributes:
        query_tokens, hit_tokens: tokens that recorded matches asked for and found.
        evicted_pages: pages that ``evict`` has released.

    Raises:
        ConfigError: an argument is of a wrong type, ``page_size`` is not the allocator's, the policy is unknown, or a
            group with full attention follows one with a window, or events are wanted where all groups have windows.
    """

    def __init__(
        self,
        allocator: PagedTokenToKVPoolAllocator,
        page_size: int,
        *,
        policy: EvictionPolicyName = "lru",
        windows: Sequence[int | None] = (None,),
        on_evict: Callable[[list[EvictedPages]], None] | None = None,
        max_events: int = 0,
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
        if None in windows and windows[0] is not None:
            raise ConfigError(
                f"windows={list(windows)} has full attention after a window: the pages of the first group tell entries "
                "apart, so it must keep them all; put full attention first, as LayerGroups.of does"
            )
        if whole_number("max_events", max_events) and windows[0] is not None:
            raise ConfigError(
                f"max_events={max_events} with windows={list(windows)}: events name the pages of full attention, and "
                "there is none; leave max_events at 0"
            )
        self.allocator = allocator
        self.caller = allocator.caller
        self.page_size = page_size
        self.policy = policy
        self.query_tokens = 0
        self.hit_tokens = 0
        self.evicted_pages = 0
        self.windows = tuple(windows)
        self._pool = allocator.pages
        self._on_evict = on_evict
        self._events = CacheEvents(max_events) if max_events else None
        self._start_with(PrefixForest(page_size))

    def _start_with(self, forest: PrefixForest) -> None:
        is_cached: Bool = np.zeros(self._pool.num_pages + 2, np.bool_)  # the last entry is no page's
        self._locked: dict[PrefixMatch, None] = {}  # the matches that hold locks
        # None where an entry is just a page.
        groups = None if self.windows == (None,) else EntryPages(self.windows, self.page_size, self._pool)
        self._forest, self._is_cached, self._groups = forest, is_cached, groups

    @property
    def evictable_pages(self) -> int:
        """Cached pages that ``evict`` could release now."""
        groups = self._groups
        return (
            self._forest.evictable if groups is None else self._forest.evictable * groups.num_full + groups.idle_pages
        )

    @property
    def protected_pages(self) -> int:
        """Cached pages under a lock, or pages of windows that requests hold."""
        return self.cached_pages - self.evictable_pages

    @property
    def cached_pages(self) -> int:
        """Pages that the cache holds, evictable and protected."""
        entries, groups = self._forest.evictable + self._forest.protected, self._groups
        return entries if groups is None else entries * groups.num_full + groups.window_pages

    def is_cached(self, pages: npt.ArrayLike) -> Bool:
        """Which of some pages of the pool the cache holds; bool ``[n]``.

        Raises:
            ShapeError: not an integer vector, or a page outside of the pool.
        """
        self._pool.ref_count(pages)
        return self._is_cached[np.asarray(pages, np.int64)]

    def pages(self) -> PageIds:
        """Every cached page; ``[cached_pages]``, in no promised order, a fresh array."""
        entries = self._entries()
        return PageIds(entries if self._groups is None else self._groups.pages(entries))

    def pages_of(self, match: PrefixMatch) -> Int32:
        """The pages of a match by group, int32 ``[groups, n]``; 0 where a group with a window has none."""
        return match.pages[None] if self._groups is None else self._groups.of(match.pages)

    def runs(self) -> Iterator[tuple[CacheScope, Int32, Int32, int]]:
        """Every page that can be found, as ``PrefixForest.runs``, by group; nothing may change in the meantime.

        Yields:
            The run's scope; the tokens from the start of the sequence to the run's end, int32; its pages of one group,
            int32; the group.
        """
        for scope, tokens, entries in self._forest.runs():
            if self._groups is None:
                yield scope, tokens, entries, 0
                continue
            before = tokens.size // self.page_size - entries.size
            for group, pages in enumerate(self._groups.of(entries)):
                for start, stop in runs_of(pages):
                    yield scope, tokens[: (before + stop) * self.page_size], pages[start:stop], group

    def match(self, scope: CacheScope, token_ids: npt.ArrayLike, *, whole: bool = False) -> PrefixMatch:
        """Finds the longest cached prefix in whole pages, after which a request can go on.

        With windows that is where each group has the last pages that the next token sees.

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
        found = self.match_entries(scope, token_ids, whole=whole)
        return found if self._groups is None else self.beginning(found, self._groups.hit_length(found.pages))

    def match_entries(self, scope: CacheScope, token_ids: npt.ArrayLike, *, whole: bool = False) -> PrefixMatch:
        """As ``match``, whatever pages of windows there are: a request cannot always go on after it."""
        tokens = token_vector(token_ids)
        tree = self._forest.find(checked_scope(scope))
        if tree is None:
            return PrefixMatch(NO_PAGES, 0, tokens.size, self._forest, None)
        most = (tokens.size if whole else max(tokens.size - 1, 0)) // self.page_size
        walk = tree.walk(tokens[: most * self.page_size])
        pages = PageIds(joined(walk.runs)) if walk.runs else NO_PAGES
        return PrefixMatch(pages, walk.num_pages * self.page_size, tokens.size, self._forest, walk.node)

    def beginning(self, match: PrefixMatch, num_pages: int) -> PrefixMatch:
        """The first pages of a match, as a match that is not locked; the match itself where it has no more."""
        if num_pages >= match.pages.size:
            return match
        pages, tokens = PageIds(match.pages[:num_pages]), num_pages * self.page_size
        return PrefixMatch(pages, tokens, match.num_queried, match.owner, match.node)

    def evictable_without(self, pages: Int32) -> int:
        """Cached pages that ``evict`` could release once a request holds these, whose entries are locked already."""
        return self.evictable_pages - (0 if self._groups is None else self._groups.idle_with(pages))

    def note_holders(self, pages: Int32) -> None:
        """Notes that requests have taken or given back references to some pages, of any group.

        What no request holds any more counts as used just now.
        """
        if self._groups is None or not pages.size:
            return
        try:
            self._groups.refresh(self._groups.entries_of(pages), self._forest.tick())
        except BaseException:
            self._mend()
            raise

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
            self._undo({match: locks}, Insertion())
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
            self._undo({match: locks}, Insertion())
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
                if self._groups is not None:
                    self._groups.use(match.pages, node.level, self._forest.tick())
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
            pages: int32 ``[n // page_size]``, held by the caller, in the order of the tokens; of several groups
                ``[groups, n // page_size]``, 0 where a window has left a page behind. Of pages of tokens that are
                cached already the cache takes those of windows that it lacks.
            priority: higher stays longer; only the policy "priority" reads it.

        Returns:
            How many tokens were cached already.

        Raises:
            ConfigError: ``scope`` is not a CacheScope.
            ShapeError: arrays of a wrong shape or dtype; a page that has no holder, is listed twice, or is cached
                already as something else.
        """
        self.caller.enter()
        tokens, page_ids = self._whole_pages(token_ids, pages)
        level = priority_level(priority)
        done = Insertion()
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
        tokens, page_ids = self._whole_pages(token_ids, pages)
        level, before = priority_level(priority), {match: match.locks}
        done = Insertion()
        if not self._accepts(scope):
            return match
        try:
            entries, _, node = self._enter(scope, tokens, page_ids, level, match, done)
            cached = PageIds(entries)
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
            self._undo(before, Insertion())
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
        tokens, page_ids = self._whole_pages(token_ids, pages)
        level, locks = priority_level(priority), match.locks
        done = Insertion()
        try:
            if self._accepts(scope):
                entries, _, node = self._enter(scope, tokens, page_ids, level, match, done)
                if self._groups is not None and node is not None:
                    self._groups.end_at(entries, node.level, self._forest.tick())
            self._unlock(match)
        except BaseException:
            self._undo({match: locks}, done)
            raise

    def evict(self, num_pages: int) -> int:
        """Releases evictable pages in the order of the policy, ends of sequences first.

        The cost per page is constant, however much is cached. Pages that a weights epoch has invalidated go first.

        Args:
            num_pages: how many to release; all evictable ones where there are fewer. With several groups it may be some
                more, because the pages of the end of a sequence go together.

        Returns:
            How many were released. They are free now, except where they have another holder.

        Raises:
            ShapeError: ``num_pages`` is not an integer, or negative.
        """
        self.caller.enter()
        if type(num_pages) is not int or num_pages < 0:
            num_pages = whole_number("cannot evict: num_pages", num_pages)
        left, before, is_told = min(num_pages, self.evictable_pages), self.evicted_pages, False
        done = Eviction()
        try:
            while left > 0:
                left -= self._evict_next(left, done)
            evicted = sum([run.size for run in done.pages])
            is_told = True  # from here on the change is completed even where something raises
            if self._on_evict is not None and done.told:
                self._on_evict(joined_runs(done.told))
            self._give_back(done.pages)
            self.evicted_pages = before + evicted
            return evicted
        except BaseException:
            if is_told:
                self.evicted_pages = before + evicted
            else:
                for leaf, tokens, entries in reversed(done.cut):
                    self._forest.put_back(leaf, tokens, entries)
                for groups, entries, pages in done.emptied:
                    groups.restore(entries, pages)
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
            self._forgotten(PrefixesForgotten(wanted))
            return before - self.cached_pages
        except BaseException:  # completes the change
            self._mend()
            self._drop(trees)
            self._forgotten(PrefixesForgotten(wanted))
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
            self._forgotten(PrefixesForgotten(None, model, epoch))
        except BaseException:
            self._mend()
            raise

    def clear(self) -> None:
        """Forgets everything, in any state of the cache; ``allocator.clear`` ends its references.

        Every match from before is refused from now on. Weights epochs and counters stay.
        """
        self.caller.enter()
        self._start_with(self._forest.empty())
        self._forgotten(PrefixesForgotten())

    def take_events(self) -> list[CacheEvent]:
        """What was cached and lost since the last call, in order; nothing where ``max_events`` is 0.

        Pages that went to a host tier count as lost.
        """
        self.caller.enter()
        return [] if self._events is None else self._events.take()

    def _forgotten(self, event: PrefixesForgotten) -> None:
        if self._events is not None:
            self._events.forgotten(event)

    def check_integrity(self) -> None:
        """Proves that trees, locks, eviction order, counters and the allocator agree; visits every node.

        Raises:
            IntegrityError: they do not; the message names the page or the counter.
        """
        self._forest.check_integrity()
        self._pool.check_integrity()
        if self._groups is not None:
            self._groups.check_integrity(self._entries())
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

    def _whole_pages(self, token_ids: npt.ArrayLike, pages: npt.ArrayLike) -> tuple[Int32, Int32]:
        """The tokens of whole pages, and the pages, int32 ``[groups, n]``; raises ShapeError where they do not fit."""
        return whole_pages(token_ids, pages, self.page_size, self.windows)

    def _entries(self) -> Int32:
        """Every entry of every tree, int32 ``[n]``."""
        return np.concatenate([NO_PAGES, *(node.pages for tree in self._forest.trees() for node in tree.nodes())])

    def _enter(
        self,
        scope: CacheScope,
        tokens: Int32,
        pages: Int32,
        priority: int,
        after: PrefixMatch | None,
        done: Insertion,
    ) -> tuple[Int32, int, RadixNode | None]:
        """Inserts whole pages, ``[groups, n]``.

        The search begins where ``after``, a locked match of the beginning, ends. A node that it alone keeps is
        lengthened under its lock: a sequence that grows by chunks is one node. ``done`` gets what ``_undo`` needs.

        Returns:
            The entries of all pages, int32 ``[n]``; how many were cached already; the node at their end.
        """
        level = priority if self.policy == "priority" else 0
        forest, count = self._forest, pages.shape[1]
        tree, start = forest.find(scope), None
        if tree is None:
            if not count:
                return NO_PAGES, 0, None
            tree = forest.plant(scope)
        elif after is not None and after.node is not None:
            start = tree.resume(after.node, after.num_tokens // self.page_size, tokens)
        walk = tree.walk(tokens, start)
        known, end, parts = walk.num_pages, walk.node, False
        runs = walk.runs if start is None or after is None else [after.pages, *walk.runs]
        if known < count:
            fresh, rest = self._fresh_entries(pages[:, known:]), tokens[known * self.page_size :]
            self._keep(pages[:, known:])
            end = forest.ending_at(end, known)
            if end is start and end.may_extend(level):
                done.nodes.append((end, end.tokens, end.pages, NO_PAGES))
                forest.extend(end, rest, fresh)
            else:
                parts = known > 0 and len(end.children) > 0
                done.nodes.append((end, end.tokens, end.pages, rest))
                end = forest.attach(end, rest, fresh, level)
            if self._events is not None:
                before = self._first_pages(joined(runs)[-1:]) if known else NO_PAGES
                self._events.cached(scope, before.item() if known else 0, rest, pages[0, known:])
            runs = [*runs, fresh]
        else:
            end = forest.ending_at(end, known)  # what lies beyond was not used
        entries = joined(runs) if runs else NO_PAGES
        if self._groups is not None:
            self._adopt(entries, pages, known, end, done)
            if parts:  # sequences part here: the next one that begins like them will go on here
                self._groups.use(entries[:known], level, forest.tick())
        # A leaf just attached to ``start``, which is the root or locked with all above it, stands in order already.
        if start is None or walk.node is not start or self.policy == "priority":
            forest.use(end, least_level=level)
        return entries, known, end

    def _first_pages(self, entries: Int32) -> Int32:
        """The pages of entries in the first group."""
        return entries if self._groups is None else self._groups.of(entries)[0]

    def _fresh_entries(self, pages: Int32) -> Int32:
        """Entries for pages, ``[groups, n]``, that are not cached."""
        return pages[0] if self._groups is None else self._groups.new_entries(pages)

    def _adopt(self, entries: Int32, pages: Int32, known: int, end: RadixNode, done: Insertion) -> None:
        """Gives entries the pages that they lack: the fresh ones after the first ``known`` all, which are kept."""
        groups = self._groups
        if groups is None:
            return
        had = np.flatnonzero(pages[groups.windowed, :known].any(axis=0))
        first = int(had[0]) if had.size else known
        lacking = groups.missing(entries[first:known], pages[:, first:known])
        new = np.concatenate([lacking, pages[:, known:]], axis=1)
        done.adopted.append((groups, entries[first:], new))
        if lacking.any():
            self._keep(lacking)
        groups.put(entries[first:], new, end, first)
        groups.refresh(entries[first:], self._forest.tick())

    def _evict_next(self, wanted: int, done: Eviction) -> int:
        """Takes out the idle window pages, or the end of the leaf, that are evicted next.

        Args:
            wanted: how many pages to take, more only where they go together.
            done: gets the pages and what an undo needs.

        Returns:
            How many pages that no request holds.
        """
        groups, forest = self._groups, self._forest
        idle = None if groups is None else groups.next_windows()
        leaf = forest.oldest() if forest.evictable and (groups is None or groups.num_full) else None
        if groups is not None and idle is not None and (leaf is None or _goes_before(idle, leaf)):
            entry, entries = idle.entry, np.array([idle.entry], np.int32)
            done.emptied.append((groups, entries, groups.of(entries)))
            pages = groups.take_windows(entry)
            done.pages.append(pages[pages > 0])
            if idle.is_warm and self._on_evict is not None:
                done.told += self._window_pages_told(entry, pages)
            if not groups.num_full:
                self._cut_empty_ends(groups, done)
            return idle.num_pages
        leaf = leaf or forest.oldest()
        before, count = self.evictable_pages, min(-(-wanted // self._pages_an_entry), leaf.pages.size)
        prefix = None if self._on_evict is None or leaf.tree.order.is_retired else leaf.tree.prefix_tokens(leaf)
        done.cut.append((leaf, leaf.tokens, leaf.pages))
        entries = forest.cut(leaf, count)
        by_group = entries[None] if groups is None else groups.of(entries)
        if prefix is not None:
            first = prefix.size // self.page_size - count
            done.told += self._told(leaf.tree.scope, prefix, first, by_group)
        if groups is None:
            done.pages.append(entries)
        else:
            done.emptied.append((groups, entries, by_group))
            done.pages.append(groups.take_out(entries))
        return before - self.evictable_pages

    def _cut_empty_ends(self, groups: EntryPages, done: Eviction) -> None:
        """Takes out the ends of the oldest leaves that have no page any more: without full attention nothing else does.

        Leaves are as old as their last window pages, so these lose theirs first.
        """
        forest = self._forest
        while forest.evictable:
            leaf = forest.oldest()
            count = groups.empty_end(leaf.pages)
            if not count:
                return
            done.cut.append((leaf, leaf.tokens, leaf.pages))
            groups.take_out(forest.cut(leaf, count))

    @property
    def _pages_an_entry(self) -> int:
        """Pages of full attention that an entry has."""
        return 1 if self._groups is None else max(self._groups.num_full, 1)

    def _told(self, scope: CacheScope, prefix: Int32, first: int, by_group: Int32) -> list[EvictedPages]:
        """What ``on_evict`` is told of entries that leave the end of ``prefix``, ``by_group[groups, n]``."""
        told = []
        for group, pages in enumerate(by_group):
            for start, stop in runs_of(pages):
                tokens = read_only(prefix[: (first + stop) * self.page_size].copy())
                told.append(
                    EvictedPages(scope, tokens, first + start, PageIds(read_only(pages[start:stop].copy())), group)
                )
        return told

    def _window_pages_told(self, entry: int, by_group: Int32) -> list[EvictedPages]:
        """What ``on_evict`` is told of the window pages of an entry that stays, ``by_group[groups]``."""
        place = None if self._groups is None else self._groups.place_of(entry)
        if place is None or place[0].tree.order.is_retired:
            return []
        node, column = place
        return self._told(
            node.tree.scope, node.tree.prefix_tokens(node)[: (column + 1) * self.page_size], column, by_group[:, None]
        )

    def _keep(self, by_group: Int32) -> None:
        """Takes a reference of pages that are to be cached, ``[groups, n]``, 0 where there is none.

        Raises:
            ShapeError: a page is cached already, is listed twice, or has no holder.
        """
        pages = by_group[0] if self._groups is None else by_group[by_group > 0]
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
        self._release_kept(pages)
        if self._events is not None:
            self._events.lost(pages)

    def _release_kept(self, pages: Int32) -> None:
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
        entries = [run for tree in trees for run in self._forest.drop(tree)]
        self._give_back(entries if self._groups is None else [self._groups.take_out(run) for run in entries])

    def _unlock(self, match: PrefixMatch) -> None:
        match.locks -= 1
        if not match.locks:
            del self._locked[match]
        if match.node is not None:
            self._forest.unlock(match.node)

    def _undo(self, locks: dict[PrefixMatch, int], done: Insertion) -> None:
        """Takes back what a call changed before it raised: the locks of matches, and what it inserted."""
        for match, count in locks.items():
            match.locks = count
            self._locked[match] = None
        for insertion in done.nodes:
            self._forest.undo_insertion(*insertion)
        for groups, entries, pages in done.adopted:
            groups.withdraw(entries, pages)
        self._mend()

    def _mend(self) -> None:
        """Derives the rest again, and releases pages that are in no tree."""
        self._locked = {match: None for match in self._locked if match.locks}
        self._forest.mend((match.node, match.locks) for match in self._locked)
        if self._groups is not None:
            self._groups.rebuild(self._entries())
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


def _goes_before(idle: IdlePages, leaf: RadixNode) -> bool:
    """Whether idle window pages are evicted before a leaf: cold ones before any that can be found."""
    if leaf.tree.order.is_retired:
        return False
    return not idle.is_warm or (idle.level, idle.stamp) < (leaf.level, leaf.stamp)


def _name_of(match: object) -> str:
    return f"a match of {match.num_tokens} tokens" if isinstance(match, PrefixMatch) else f"a {type(match).__name__}"
