"""What the prefix cache keeps: trees, locks and references, and how they are made right after a fault half way.

Few facts are told and all else follows from them: the children and the pages of each node, the locked matches, the
pages that have a reference, the weights epochs. A call that raises takes back what it told, and ``_mend`` works out the
rest anew; so the steps of a call need no order of their own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, DoubleFreeError
from engine.memory.integers import Bool, Int32, Int64, integer_vector
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator
from engine.memory.prefix.cached_pages import CachedPages
from engine.memory.prefix.forest import PrefixForest
from engine.memory.prefix.match import PrefixMatch
from engine.memory.prefix.node_ledger import NodeLedger
from engine.memory.prefix.tree import NO_PAGES, RadixNode, joined
from engine.memory.scope import CacheScope

# What an insertion changed: a node, its tokens and pages before, and the tokens of a child that it has been given.
Insertion = tuple[RadixNode, Int32, Int32, Int32]


class PrefixBooks:
    """Trees of cached pages over an allocator; ``RadixCache`` is what is done with them.

    Args:
        allocator: counts the references.
        page_size: tokens a page, the allocator's.
        levels_by_priority: whether what was inserted with a lower priority is evicted first.
    """

    def __init__(self, allocator: PagedTokenToKVPoolAllocator, page_size: int, levels_by_priority: bool) -> None:
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
        self._levels_by_priority = levels_by_priority
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

    def is_cached(self, pages: npt.ArrayLike) -> Bool:
        """Which of some pages of the pool the cache holds; bool ``[n]``.

        Raises:
            ShapeError: not an integer vector, or a page outside of the pool.
        """
        return self._pages.holds(integer_vector("pages", pages))

    def pages(self) -> Int32:
        """Every cached page; int32 ``[cached_pages]``, in no promised order, fresh."""
        return np.concatenate([np.empty(0, np.int32), *self._runs()])

    def clear(self) -> None:
        """Forgets everything, whatever state the books are in; the references are for ``allocator.clear`` to end.

        Every match from before is refused from now on. Weights epochs and counters stay.
        """
        self.caller.enter()
        self._start_with(self._forest.empty())

    def check_integrity(self) -> None:
        """Proves that trees, locks, eviction order, counters and the allocator agree; visits everything.

        Raises:
            IntegrityError: says what is wrong, with the page where it is one.
        """
        self._nodes.check_integrity()
        self._pages.check_integrity(self._runs())

    def _start_with(self, forest: PrefixForest) -> None:
        nodes, pages = NodeLedger(forest), CachedPages(self.allocator)
        self._locked: dict[PrefixMatch, None] = {}  # the matches that hold locks
        self._forest, self._nodes, self._pages = forest, nodes, pages

    def _runs(self) -> list[Int32]:
        return [node.pages for tree in self._forest.trees() for node in tree.nodes()]

    def _enter(
        self,
        scope: CacheScope,
        tokens: Int32,
        page_ids: Int64,
        priority: int,
        after: PrefixMatch | None,
        done: list[Insertion],
    ) -> PrefixMatch:
        """Inserts whole pages; says what was cached already, with the node at the end of them all.

        The search begins where ``after``, a locked match of the beginning, ends. What it alone keeps is lengthened
        under its lock: a sequence that grows by chunks is one node. What is to be undone by ``_undo`` goes to ``done``.
        """
        level = priority if self._levels_by_priority else 0
        tree = self._forest.find(scope)
        start = None
        if tree is not None and after is not None and after.node is not None:
            start = tree.resume(after.node, after.num_tokens // self.page_size, tokens)
        walk = None if tree is None else tree.walk(tokens, start)
        known = 0 if walk is None else walk.num_pages
        node = end_of_walk = None if walk is None else walk.node
        if known < page_ids.size:
            added = page_ids[known:]
            self._pages.add(added)
            end = self._forest.plant(scope).root if node is None else self._nodes.ending_at(node, known)
            fresh, rest = added.astype(np.int32), tokens[known * self.page_size :]
            if end is start and self._nodes.may_extend(end, level):
                done.append((end, end.tokens, end.pages, NO_PAGES))
                self._nodes.extend(end, rest, fresh)
                node = end
            else:
                done.append((end, end.tokens, end.pages, rest))
                node = self._nodes.attach(end, rest, fresh, level)
        elif node is not None:
            node = self._nodes.ending_at(node, known)  # what lies beyond was not used
        # What was attached to ``start``, which is the root or locked with all above it, stands in order already.
        if node is not None and (start is None or end_of_walk is not start or self._levels_by_priority):
            self._nodes.use(node, least_level=level)
        pages = NO_PAGES if walk is None else walk.pages
        if start is not None and after is not None:
            pages = joined([after.pages[: start.end], pages])
        return PrefixMatch(pages, known * self.page_size, tokens.size, self._forest, node)

    def _undo(self, locks: dict[PrefixMatch, int], done: list[Insertion]) -> None:
        """Takes back what a call told before it raised: the locks of matches as they were, and what it inserted."""
        for match, count in locks.items():
            match.locks = count
            self._locked[match] = None
        for node, tokens, pages, child in done:
            node.hold(tokens, pages)
            leaf = node.children.pop(node.tree.key_of(child), None) if child.size else None
            if leaf is not None:
                leaf.attached = False
        self._mend()

    def _mend(self) -> None:
        """Works out anew all that follows, and gives back the references of pages that are in no tree."""
        self._locked = {match: None for match in self._locked if match.locks}
        self._nodes.mend(self._locked)
        self._pages.keep_only(self.pages())

    def _require_locked(self, match: PrefixMatch) -> None:
        self.caller.enter()
        if getattr(match, "owner", None) is not self._forest or match.locks == 0:
            raise DoubleFreeError(
                f"cannot unlock {_name_of(match)}: it holds no lock of this cache; unlock once per lock, through the "
                "handle that was locked"
            )

    def _require_current(self, match: PrefixMatch) -> RadixNode | None:
        """The node around the end of a match; refuses a match that is out of date. One that is locked never is."""
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
            node = self._nodes.ending_at(node, match.num_tokens // self.page_size)
        match.node = node
        return node


def _name_of(match: object) -> str:
    return f"a match of {match.num_tokens} tokens" if isinstance(match, PrefixMatch) else f"a {type(match).__name__}"
