"""Radix trees over token ids, one page the smallest step: the nodes, the tree of one scope, and all trees of a cache.

The idea is RadixAttention's (arXiv 2312.07104); here an edge holds whole pages only, and children are found by the
tokens of their first page. Python works once per node, never once per token: the tokens of a node are compared in one
pass over memory, and always compared, since the children's hash table compares its keys too.

``RadixTree`` only finds. ``PrefixForest`` makes every change of a node, with its effects on counters and orders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from engine.errors import ConfigError, IntegrityError
from engine.memory.integers import Int32, is_integer
from engine.memory.prefix.eviction import Evictable, EvictionOrder, UseList
from engine.memory.scope import CacheScope

# Hits beyond this many no longer tell nodes apart; it bounds the number of levels.
MAX_FREQUENCY = 255

Generation = tuple[str, int]  # a model and its weights epoch


class RadixNode(Evictable):
    """A run of pages that follow one another in every sequence that reaches it.

    Attributes:
        tree: the tree that it was made for.
        parent: the node before; None for the root. Kept when the node leaves the tree.
        start: pages before this node.
        tokens: int32 ``[num_pages * page_size]``.
        pages: int32 ``[num_pages]`` page ids, read-only.
        only_page: the page where there is just one, else 0.
        children: the nodes that follow, by the tokens of their first page as bytes.
        locks: handles that protect this node, with those that end below it.
        attached: whether it is still in the tree.
        is_trimmed: whether it has lost pages at its end.
    """

    __slots__ = (
        "attached",
        "children",
        "is_trimmed",
        "locks",
        "only_page",
        "pages",
        "parent",
        "start",
        "tokens",
        "tree",
    )

    def __init__(self, tree: RadixTree, parent: RadixNode | None, start: int, tokens: Int32, pages: Int32) -> None:
        super().__init__(level=0, stamp=0)
        self.tree = tree
        self.parent = parent
        self.start = start
        self.hold(tokens, pages)
        self.children: dict[bytes, RadixNode] = {}
        self.locks = 0
        self.attached = True
        self.is_trimmed = False

    def hold(self, tokens: Int32, pages: Int32) -> None:
        """Gives the node its pages and their tokens."""
        only_page = int(pages[0]) if pages.size == 1 else 0
        self.tokens, self.pages, self.only_page = tokens, pages, only_page  # together: no fault falls between them

    @property
    def num_pages(self) -> int:
        """Pages of this node alone."""
        return self.pages.size

    @property
    def end(self) -> int:
        """Pages from the root to the end of this node."""
        return self.start + self.pages.size

    def may_extend(self, level: int) -> bool:
        """Whether this node, locked by one handle, may take more pages of ``level`` under its lock.

        It must be a leaf that was never trimmed: a handle from before the trim would take the new pages for its own.
        """
        return self.locks == 1 and self.level == level and not self.children and not self.is_trimmed

    def path(self) -> Iterator[RadixNode]:
        """This node and its ancestors, upwards, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class Walk(NamedTuple):
    """How far a sequence is in a tree.

    Attributes:
        node: the last node that shares a page with it; the root where none does.
        num_pages: pages shared from the root on; they may end inside ``node``.
        runs: int32 page ids of the shared pages from where the walk began, in order.
    """

    node: RadixNode
    num_pages: int
    runs: list[Int32]


class RadixTree:
    """The cached sequences of one scope.

    Args:
        scope: scope of every node.
        order: eviction order; holds the tree's nodes that may be evicted.
        page_size: tokens per page.
    """

    __slots__ = ("_key_type", "order", "page_size", "root", "scope")

    def __init__(self, scope: CacheScope, order: EvictionOrder[RadixNode], page_size: int) -> None:
        self.scope = scope
        self.order = order
        self.page_size = page_size
        self._key_type = np.dtype(f"V{4 * page_size}")
        nothing = np.empty(0, np.int32)
        self.root = RadixNode(self, None, 0, nothing, nothing)

    def walk(self, tokens: Int32, start: RadixNode | None = None) -> Walk:
        """Follows a sequence as far as it is cached; changes nothing.

        Args:
            tokens: int32, whole pages.
            start: a node of this tree; the sequence is known to be cached up to its end. None is the root.
        """
        node = start or self.root
        data, total, size = tokens.tobytes(), tokens.size // self.page_size, self._key_type.itemsize
        at, block = node.end, 1
        runs: list[Int32] = []
        singles: list[int] = []  # pages of nodes of one page since the last run: joined at once, they cost a fifth
        while at < total:
            block = min(block, total - at)  # keys are cut out in blocks, which double while nodes have one page each
            if block == 1:
                keys = [data[at * size : (at + 1) * size]]
            else:
                keys = np.frombuffer(data, self._key_type, block, at * size).tolist()
            before = len(singles)
            child = None
            for key in keys:
                child = node.children.get(key)
                if child is None or not child.only_page:
                    break
                node = child
                singles.append(child.only_page)  # whose tokens the lookup has compared
            at += len(singles) - before
            if child is None:
                break
            if child.only_page:
                block *= 2
                continue
            node, block = child, 1
            whole = data.startswith(node.tokens.data, at * size)
            shared = node.pages.size if whole else self._shared_pages(tokens, at, node)
            runs += _as_runs(singles)
            runs.append(node.pages[:shared])
            singles = []
            at += shared
            if not whole:
                break
        return Walk(node, at, runs + _as_runs(singles))

    def resume(self, node: RadixNode, num_pages: int, tokens: Int32) -> RadixNode | None:
        """``node``, if a walk may begin at its end: it ends ``num_pages`` from this root, and the tokens begin so."""
        if node.tree is not self or node.end != num_pages:
            return None
        data, size = tokens.tobytes(), self._key_type.itemsize
        return node if all(data.startswith(step.tokens.data, step.start * size) for step in node.path()) else None

    def nodes(self) -> Iterator[RadixNode]:
        """Every node but the root, parents before children."""
        pending = list(self.root.children.values())
        while pending:
            node = pending.pop()
            pending.extend(node.children.values())
            yield node

    def prefix_tokens(self, node: RadixNode) -> Int32:
        """The tokens from the root to the end of a node; int32 ``[node.end * page_size]``."""
        runs = [ancestor.tokens for ancestor in node.path()]
        return np.concatenate(runs[::-1]) if runs else self.root.tokens

    def check_integrity(self) -> None:
        """Proves that the nodes join up and that locks cover ancestors.

        Raises:
            IntegrityError: names the first page of the wrong node.
        """
        for node in (self.root, *self.nodes()):
            joins = all(
                child.parent is node and child.attached and child.start == node.end and self.key_of(child.tokens) == key
                for key, child in node.children.items()
            )
            filled = node is self.root or node.num_pages > 0
            filled = filled and node.only_page == (node.pages[0] if node.num_pages == 1 else 0)
            below = sum(child.locks for child in node.children.values())
            covered = node is self.root or node.locks >= below
            if not (joins and filled and covered and node.tokens.size == node.num_pages * self.page_size):
                raise IntegrityError(
                    f"the node of pages {node.pages[:4]} after {node.start} pages is wrong: {node.tokens.size} tokens, "
                    f"{node.locks} locks and {below} below, {len(node.children)} children; this is a bug, report it"
                )

    def _shared_pages(self, tokens: Int32, start: int, node: RadixNode) -> int:
        return _common_prefix(tokens[start * self.page_size :], node.tokens) // self.page_size

    def key_of(self, tokens: Int32) -> bytes:
        """The key among its parent's children of a node with these tokens."""
        return tokens[: self.page_size].tobytes()


class PrefixForest:
    """One radix tree per scope; one eviction order for all trees of a model at one weights epoch.

    That order is the unit of invalidation: retiring it makes every node of the generation unreachable and first to be
    evicted, without a visit to any.

    All state follows from a few facts: the children and the pages of each node, the weights epochs, and the locked
    matches that the cache keeps. ``mend`` derives the rest again after a fault, so the steps of a change need no order.

    Args:
        page_size: tokens per page.

    Attributes:
        evictable: pages in nodes that have no lock.
        protected: pages in nodes that have one.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.evictable = 0
        self.protected = 0
        self._clock = 0
        self._epochs: dict[str, int] = {}
        self._trees: dict[CacheScope, RadixTree] = {}
        self._dropped: set[RadixTree] = set()
        self._start_orders()

    def empty(self) -> PrefixForest:
        """A forest without trees that accepts the same scopes."""
        forest = PrefixForest(self.page_size)
        forest._epochs = dict(self._epochs)
        return forest

    def tick(self) -> int:
        """The logical time of a use that is noted now."""
        self._clock += 1
        return self._clock

    def trees(self) -> Iterator[RadixTree]:
        """Every tree that has nodes, also those that cannot be reached any more."""
        yield from self._trees.values()
        yield from self._dropped

    def accepts(self, scope: CacheScope) -> bool:
        """Whether entries of this scope may be added: its weights have not been replaced."""
        return scope.weights_epoch >= self._epochs.get(scope.model, 0)

    def find(self, scope: CacheScope) -> RadixTree | None:
        """The tree of a scope, if it has one that can be reached."""
        tree = self._trees.get(scope)
        return None if tree is None or tree.order.is_retired else tree

    def plant(self, scope: CacheScope) -> RadixTree:
        """Makes the tree of an accepted scope that has none."""
        tree = self._trees[scope] = RadixTree(scope, self._count_tree(scope), self.page_size)
        return tree

    def attach(self, parent: RadixNode, tokens: Int32, pages: Int32, level: int) -> RadixNode:
        """Adds an evictable leaf, with copies of the arrays, below ``parent``, which has no child with that first page.

        The leaf needs a ``use`` to stand in order.
        """
        kept_tokens, kept_pages = tokens.copy(), pages.copy()
        kept_pages.flags.writeable = False  # what a match returns is a view of it
        node = RadixNode(parent.tree, parent, parent.end, kept_tokens, kept_pages)
        self._clock += 1
        node.level, node.stamp = level, self._clock
        parent.children[node.tree.key_of(kept_tokens)] = node
        node.tree.order.append(node)
        self.evictable += node.num_pages
        return node

    def extend(self, leaf: RadixNode, tokens: Int32, pages: Int32) -> None:
        """Adds pages to the end of a locked leaf that ``may_extend``."""
        leaf.hold(np.concatenate([leaf.tokens, tokens]), joined([leaf.pages, pages]))
        self.protected += pages.size

    def ending_at(self, node: RadixNode, num_pages: int) -> RadixNode:
        """The node of this path that ends ``num_pages`` from the root: ``node`` or its upper part, split off."""
        return node if node.end == num_pages else self.split(node, num_pages - node.start)

    def split(self, node: RadixNode, num_pages: int) -> RadixNode:
        """Cuts a node in two after its first ``num_pages`` pages and returns the upper half.

        The lower half stays the same object with the same end, so a reference to the end of a node stays right; locks
        of the node cover both halves.
        """
        tree, parent, cut = node.tree, node.parent, num_pages * self.page_size
        if parent is None:
            raise IntegrityError("the root of a prefix tree was to be split; it has no pages; this is a bug, report it")
        start, tokens, pages = node.start, node.tokens, node.pages
        upper = RadixNode(tree, parent, start, tokens[:cut], pages[:num_pages])
        upper.level, upper.stamp, upper.locks = node.level, node.stamp, node.locks
        upper.children[tree.key_of(tokens[cut:])] = node
        try:
            node.hold(tokens[cut:], pages[num_pages:])
            node.parent, node.start = upper, upper.end
            parent.children[tree.key_of(tokens)] = upper
            if node.locks == 0:
                tree.order.insert_after(node, upper)
            return upper
        except BaseException:
            node.hold(tokens, pages)
            node.parent, node.start = parent, start
            parent.children[tree.key_of(tokens)] = node
            raise

    def cut(self, leaf: RadixNode, num_pages: int) -> Int32:
        """Takes the last pages off an evictable leaf, and the leaf out with its last page; int32 ``[num_pages]``."""
        left = leaf.pages.size - num_pages
        if leaf.parent is None or leaf.children:
            raise IntegrityError(
                f"a node with {len(leaf.children)} children was to leave a prefix tree; only a leaf other than the "
                "root may; this is a bug, report it"
            )
        self.evictable -= num_pages
        if left:
            removed = leaf.pages[left:]
            leaf.is_trimmed = True
            leaf.hold(leaf.tokens[: left * self.page_size], leaf.pages[:left])
            return removed
        tree = leaf.tree
        tree.order.remove(leaf)
        leaf.attached = False
        del leaf.parent.children[tree.key_of(leaf.tokens)]
        if not tree.root.children:
            self._dropped.discard(tree)
            if self._trees.get(tree.scope) is tree:
                self._forget(tree.scope)
        return leaf.pages

    def put_back(self, leaf: RadixNode, tokens: Int32, pages: Int32) -> None:
        """Undoes a ``cut`` of a leaf that had these tokens and pages, as far as ``mend`` needs it."""
        tree = leaf.tree
        leaf.hold(tokens, pages)
        leaf.attached = True
        if leaf.parent is not None:
            leaf.parent.children[tree.key_of(tokens)] = leaf
        if tree.order is self._retired_order:
            self._dropped.add(tree)
        else:
            self._trees[tree.scope] = tree

    def undo_insertion(self, node: RadixNode, tokens: Int32, pages: Int32, child: Int32) -> None:
        """Undoes an ``extend`` or ``attach``, as far as ``mend`` needs it.

        Args:
            node: the node that was extended or given a child.
            tokens: the node's tokens before.
            pages: the node's pages before.
            child: the tokens of the child; empty where there was none.
        """
        node.hold(tokens, pages)
        leaf = node.children.pop(node.tree.key_of(child), None) if child.size else None
        if leaf is not None:
            leaf.attached = False

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
            node: a node of a tree that can be reached.
            counts_hit: whether the levels rise by one.
            least_level: lower levels rise to it.
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

    def oldest(self) -> RadixNode:
        """The leaf to be evicted next; only while ``evictable`` is above 0. A constant cost per generation in reach."""
        best = self._retired.oldest()
        if best is None:
            for order in self._orders.values():
                first = order.oldest()
                if first is not None and (best is None or (first.level, first.stamp) < (best.level, best.stamp)):
                    best = first
        if best is None:
            raise IntegrityError(f"{self.evictable} pages count as evictable and none is; this is a bug, report it")
        return best

    def drop(self, tree: RadixTree) -> list[Int32]:
        """Makes a tree unreachable and takes out what is not locked, at the cost of a walk through the tree.

        Returns:
            The pages taken out, int32, one array per node.
        """
        free = [node for node in tree.nodes() if node.locks == 0]
        for node in reversed(free):  # children before parents
            tree.order.remove(node)
            node.attached = False
            if node.parent is not None:
                del node.parent.children[tree.key_of(node.tokens)]
        if self._trees.get(tree.scope) is tree:
            self._dropped.add(tree)  # first: no fault loses sight of it
            self._forget(tree.scope)
        tree.order = self._retired_order
        if not tree.root.children:
            self._dropped.discard(tree)
        runs = [node.pages for node in free]
        self.evictable -= sum(run.size for run in runs)
        return runs

    def check_epoch(self, model: str, epoch: int) -> None:
        """Raises ConfigError where ``epoch`` is no epoch, or one before that of the model."""
        now = self._epochs.get(model, 0)
        if not is_integer(epoch) or epoch < now:
            raise ConfigError(
                f"the weights epoch of {model!r} cannot go from {now} to {epoch!r}: it counts replacements; raise it"
            )

    def raise_epoch(self, model: str, epoch: int) -> None:
        """Retires every generation of a model before a checked ``epoch``, without visiting a node."""
        self._epochs[model] = epoch
        for generation in [key for key in self._orders if key[0] == model and key[1] < epoch]:
            self._orders.pop(generation).retire(self._retired)
            del self._tree_counts[generation]

    def runs(self) -> Iterator[tuple[CacheScope, Int32, Int32]]:
        """Every page that can be reached, once, in as few runs of consecutive pages as possible.

        The longest unused run comes first, and always before the run that it branches off.

        Yields:
            The run's scope; the tokens from the start of the sequence to the run's end, int32; its page ids, int32.
        """
        paths: list[list[RadixNode]] = []
        for tree in self._trees.values():
            pending = [] if tree.order.is_retired else list(tree.root.children.values())
            while pending:
                path = [pending.pop()]
                while path[-1].children:
                    *others, last = sorted(path[-1].children.values(), key=_stamp)
                    pending += others
                    path.append(last)
                paths.append(path)
        paths.reverse()  # what branches off a run was found after it
        for path in sorted(paths, key=lambda path: path[0].stamp):
            yield path[0].tree.scope, path[0].tree.prefix_tokens(path[-1]), joined([node.pages for node in path])

    def mend(self, locked: Iterable[tuple[RadixNode | None, int]]) -> None:
        """Derives again, after a fault half way, what follows from the nodes' pages and children.

        That is each node's place, locks and parent, the counters and the eviction orders. A use that was broken off
        counts.

        Args:
            locked: per locked match, the node where it ends and its locks.
        """
        locks: Counter[RadixNode] = Counter()
        for end, count in locked:
            for step in () if end is None else end.path():
                locks[step] += count
        trees = dict.fromkeys(self.trees())
        self._dropped = {tree for tree in self._dropped if tree.root.children}
        kept = [tree for tree in trees if tree.root.children and tree not in self._dropped]
        self._trees = {tree.scope: tree for tree in kept}
        self._start_orders()
        nodes: list[RadixNode] = []
        for tree in self.trees():
            mine = [tree.root, *tree.nodes()]  # parents first
            for node in mine:
                node.locks, node.attached = locks.get(node, 0), True
                for child in node.children.values():
                    child.parent, child.start = node, node.end
            for node in reversed(mine[1:]):  # completes an interrupted use up to the root
                if node.parent is not None:
                    node.parent.level = max(node.parent.level, node.level)
                    node.parent.stamp = max(node.parent.stamp, node.stamp)
            in_reach = tree not in self._dropped and self.accepts(tree.scope)
            tree.order = self._count_tree(tree.scope) if in_reach else self._retired_order
            nodes += mine[1:]
        self.evictable, self.protected = _pages_by_lock(nodes)
        unlocked = [node for node in nodes if node.locks == 0]
        for node in sorted(unlocked, key=lambda node: (node.level, node.stamp, -node.start)):
            node.tree.order.append(node)

    def check_integrity(self) -> None:
        """Proves that trees join up, counters agree, and eviction orders hold the unlocked nodes, leaves first.

        Raises:
            IntegrityError: says which page, list or counter is wrong.
        """
        for tree in self.trees():
            tree.check_integrity()
        for order in self._orders.values():
            order.check_integrity()
        nodes = [node for tree in self.trees() for node in tree.nodes()]
        unlocked = {node for node in nodes if node.locks == 0}
        ordered = [*self._retired, *(node for order in self._orders.values() for node in order)]
        place = {node: at for at, node in enumerate(ordered)}
        if len(place) != len(ordered) or place.keys() != unlocked:
            raise IntegrityError(
                f"{len(ordered)} nodes stand in eviction lists, {len(unlocked)} are not locked; each of these must "
                "stand there once; this is a bug, report it"
            )
        for node in ordered:
            if node.parent in place and place[node.parent] < place[node]:
                raise IntegrityError(
                    f"the node of pages {node.pages[:4]} stands after its parent in the eviction order; a child goes "
                    "first; this is a bug, report it"
                )
        counted = _pages_by_lock(nodes)
        if counted != (self.evictable, self.protected):
            raise IntegrityError(
                f"the counters say {self.evictable} evictable and {self.protected} protected pages, the trees "
                f"{counted[0]} and {counted[1]}; this is a bug, report it"
            )

    def _protect(self, node: RadixNode) -> None:
        """Adds a lock to one node."""
        if node.locks == 0:
            node.tree.order.remove(node)
            self.evictable -= node.num_pages
            self.protected += node.num_pages
        node.locks += 1

    def _start_orders(self) -> None:
        self._orders: dict[Generation, EvictionOrder[RadixNode]] = {}
        self._tree_counts: Counter[Generation] = Counter()
        self._retired: UseList[RadixNode] = UseList()
        self._retired_order: EvictionOrder[RadixNode] = EvictionOrder()
        self._retired_order.retire(self._retired)

    def _count_tree(self, scope: CacheScope) -> EvictionOrder[RadixNode]:
        """Counts one more tree of a scope's generation and returns the generation's order."""
        generation = (scope.model, scope.weights_epoch)
        self._tree_counts[generation] += 1
        return self._orders.setdefault(generation, EvictionOrder())

    def _forget(self, scope: CacheScope) -> None:
        """Forgets the tree of a scope, and its generation with the last of its trees."""
        del self._trees[scope]
        generation = (scope.model, scope.weights_epoch)
        if generation in self._orders:
            self._tree_counts[generation] -= 1
            if not self._tree_counts[generation]:
                del self._orders[generation], self._tree_counts[generation]


def joined(runs: list[Int32]) -> Int32:
    """One run after the other; read-only."""
    pages = np.concatenate(runs)
    pages.flags.writeable = False
    return pages


def _pages_by_lock(nodes: list[RadixNode]) -> tuple[int, int]:
    """Pages in nodes that have no lock, and in those that have one."""
    protected = sum(node.num_pages for node in nodes if node.locks)
    return sum(node.num_pages for node in nodes) - protected, protected


def _stamp(node: RadixNode) -> int:
    return node.stamp


def _as_runs(pages: list[int]) -> list[Int32]:
    return [np.array(pages, np.int32)] if pages else []


def _common_prefix(a: Int32, b: Int32) -> int:
    """How many entries two arrays share from the first on."""
    shorter = min(a.size, b.size)
    differs = a[:shorter] != b[:shorter]
    first = int(differs.argmax()) if shorter else 0
    return first if shorter and differs[first] else shorter
