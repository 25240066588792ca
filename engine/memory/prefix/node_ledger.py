"""Which cached nodes are protected and which evictable, and what a use does to the order of eviction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from engine.errors import IntegrityError
from engine.memory.integers import Int32
from engine.memory.prefix.forest import PrefixForest
from engine.memory.prefix.match import PrefixMatch
from engine.memory.prefix.tree import RadixNode, RadixTree

# Hits beyond this many no longer tell nodes apart; it bounds the number of levels.
MAX_FREQUENCY = 255


class NodeLedger:
    """Keeps counters and eviction orders true while nodes are added, cut, locked and used.

    Attributes:
        forest: the trees.
        evictable: pages in nodes that have no lock.
        protected: pages in nodes that have one.
    """

    def __init__(self, forest: PrefixForest) -> None:
        self.forest = forest
        self.evictable = 0
        self.protected = 0
        self._clock = 0

    def attach(self, parent: RadixNode, tokens: Int32, pages: Int32, level: int) -> RadixNode:
        """Adds an evictable leaf of at least one page; it needs a ``use`` before it stands in order."""
        node = parent.tree.attach(parent, tokens, pages)
        self._clock += 1
        node.level, node.stamp = level, self._clock
        node.tree.order.append(node)
        self.evictable += node.num_pages
        return node

    def may_extend(self, node: RadixNode, level: int) -> bool:
        """Whether a node that one handle keeps may take more pages, of ``level``, under its lock.

        It must be a leaf that was never trimmed: a handle from before could take the new pages for those it had.
        """
        return node.locks == 1 and node.level == level and not node.children and not node.is_trimmed

    def extend(self, leaf: RadixNode, tokens: Int32, pages: Int32) -> None:
        """Adds pages to the end of a locked leaf."""
        leaf.tree.extend(leaf, tokens, pages)
        self.protected += pages.size

    def ending_at(self, node: RadixNode, num_pages: int) -> RadixNode:
        """The node of this path that ends ``num_pages`` from the root, ``node`` or its upper part, split off."""
        if node.end == num_pages:
            return node
        upper = node.tree.split(node, num_pages - node.start)
        if node.locks == 0:
            node.tree.order.insert_after(node, upper)
        return upper

    def lock(self, node: RadixNode) -> None:
        """Protects a node and its ancestors, once more."""
        for step in node.path():
            self._protect(step)

    def move_lock(self, source: RadixNode | None, target: RadixNode | None) -> None:
        """The same as ``lock`` of ``target`` and ``unlock`` of ``source``, without visiting what lies above both."""
        for step in () if target is None else target.path():
            if step is source:
                return
            self._protect(step)
        if source is not None:
            self.unlock(source)

    def unlock(self, node: RadixNode) -> None:
        """Takes back one ``lock``; what becomes evictable counts as used just now."""
        self._clock += 1
        for step in node.path():
            step.locks -= 1
            if step.locks == 0:
                step.stamp = self._clock
                step.tree.order.append(step)
                self.evictable += step.num_pages
                self.protected -= step.num_pages

    def use(self, node: RadixNode, *, counts_hit: bool = False, least_level: int | None = None) -> None:
        """Makes a node and its ancestors the last used, children first, as the eviction order demands.

        Args:
            node: of a tree that can be reached.
            counts_hit: whether their levels rise by one.
            least_level: below which their levels may not stay.
        """
        self._clock += 1
        order = node.tree.order
        for step in node.path():
            if step.locks == 0:
                order.remove(step)
            if counts_hit and step.level < MAX_FREQUENCY:
                step.level += 1
            if least_level is not None and step.level < least_level:
                step.level = least_level
            step.stamp = self._clock
            if step.locks == 0:
                order.append(step)

    def mend(self, matches: Iterable[PrefixMatch]) -> None:
        """Works out anew all that follows from the trees and the locked matches, after a fault half way.

        Each node's place, locks and ancestors, the counters, the eviction orders. A use that was broken off counts.
        """
        locks: Counter[RadixNode] = Counter()
        for match in matches:
            for step in () if match.node is None else match.node.path():
                locks[step] += match.locks
        self.forest.mend(locks)
        nodes = [node for tree in self.forest.trees() for node in tree.nodes()]
        self.evictable = sum(node.num_pages for node in nodes if node.locks == 0)
        self.protected = sum(node.num_pages for node in nodes if node.locks > 0)

    def next_leaf(self) -> RadixNode:
        """The leaf whose pages are evicted next; only while ``evictable`` is above 0."""
        leaf = self.forest.oldest()
        if leaf is None:
            raise IntegrityError(f"{self.evictable} pages count as evictable and none is; this is a bug, report it")
        return leaf

    def cut(self, leaf: RadixNode, num_pages: int) -> Int32:
        """Takes the last pages off an evictable leaf, the leaf itself with its last page; int32 ``[num_pages]``."""
        tree = leaf.tree
        self.evictable -= num_pages
        if num_pages < leaf.pages.size:
            return tree.trim(leaf, num_pages)
        tree.order.remove(leaf)
        tree.detach(leaf)
        if not tree.root.children:
            self.forest.clear_away(tree)
        return leaf.pages

    def put_back(self, leaf: RadixNode, tokens: Int32, pages: Int32) -> None:
        """Undoes a ``cut``, up to what ``mend`` works out, of a leaf that had these tokens and pages."""
        leaf.tree.put_back(leaf, tokens, pages)
        self.forest.put_back(leaf.tree)

    def drop(self, tree: RadixTree) -> list[Int32]:
        """Makes a tree unreachable and takes what is not locked out of it; the pages, int32, one array a node."""
        runs = [node.pages for node in self.forest.drop(tree)]
        self.evictable -= sum(run.size for run in runs)
        return runs

    def check_integrity(self) -> None:
        """Proves that trees, orders and counters agree; raises IntegrityError if not."""
        self.forest.check_integrity()
        nodes = [node for tree in self.forest.trees() for node in tree.nodes()]
        evictable = sum(node.num_pages for node in nodes if node.locks == 0)
        protected = sum(node.num_pages for node in nodes if node.locks > 0)
        if (evictable, protected) != (self.evictable, self.protected):
            raise IntegrityError(
                f"the counters say {self.evictable} evictable and {self.protected} protected pages, the trees "
                f"{evictable} and {protected}; this is a bug, report it"
            )

    def _protect(self, node: RadixNode) -> None:
        """Adds a lock to one node."""
        if node.locks == 0:
            node.tree.order.remove(node)
            self.evictable -= node.num_pages
            self.protected += node.num_pages
        node.locks += 1
