"""A radix tree over token ids, one page the smallest step.

The idea is RadixAttention's (arXiv 2312.07104); here an edge holds whole pages only, and children are found by the
tokens of their first page. Python works once a node, never once a token: the tokens of a node are compared in one
stroke of memory, and always compared, since the children's hash table compares its keys too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from engine.errors import IntegrityError
from engine.memory.integers import Int32
from engine.memory.prefix.eviction import Evictable, EvictionOrder
from engine.memory.scope import CacheScope

NO_PAGES = np.empty(0, np.int32)
NO_PAGES.flags.writeable = False


class RadixNode(Evictable):
    """A run of pages that follow one another in every sequence that reaches it.

    Attributes:
        tree: the tree that it was made for.
        parent: the node before; None for the root. Kept when the node is detached.
        start: pages before this node.
        tokens: int32 ``[num_pages * page_size]``.
        pages: int32 ``[num_pages]`` page ids, read-only.
        only_page: the page where there is just one, else 0.
        children: the tokens of their first page, as bytes, to the nodes that follow.
        locks: handles that protect this node, those that end below it counted.
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
        runs: the shared pages from where the walk began, int32, in order.
    """

    node: RadixNode
    num_pages: int
    runs: list[Int32]

    @property
    def pages(self) -> Int32:
        """The runs joined; read-only."""
        return joined(self.runs) if self.runs else NO_PAGES


class RadixTree:
    """The cached sequences of one scope.

    Args:
        scope: of every node.
        order: where those of its nodes stand that may be evicted.
        page_size: tokens a page.
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
            start: a node of this tree to the end of which the sequence is known to be cached; None is the root.
        """
        node = start or self.root
        data, total, size = tokens.tobytes(), tokens.size // self.page_size, self._key_type.itemsize
        at, block = node.end, 1
        runs: list[Int32] = []
        singles: list[int] = []  # pages of nodes of one page since the last run: joined at once, they cost a fifth
        while at < total:
            block = min(block, total - at)  # keys are cut out in blocks, which double from one page a node to the next
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

    def attach(self, parent: RadixNode, tokens: Int32, pages: Int32) -> RadixNode:
        """Adds a leaf below ``parent``, which has no child with that first page; keeps copies of the arrays."""
        kept_tokens, kept_pages = tokens.copy(), pages.copy()
        kept_pages.flags.writeable = False  # what a match returns is a view of it
        node = RadixNode(self, parent, parent.end, kept_tokens, kept_pages)
        parent.children[self._key(node)] = node
        return node

    def extend(self, leaf: RadixNode, tokens: Int32, pages: Int32) -> None:
        """Adds pages to the end of a leaf other than the root."""
        leaf.hold(np.concatenate([leaf.tokens, tokens]), joined([leaf.pages, pages]))

    def resume(self, node: RadixNode, num_pages: int, tokens: Int32) -> RadixNode | None:
        """``node``, if a walk may begin at its end: it ends ``num_pages`` from this root, and the tokens begin so."""
        if node.tree is not self or node.end != num_pages:
            return None
        data, size = tokens.tobytes(), self._key_type.itemsize
        return node if all(data.startswith(step.tokens.data, step.start * size) for step in node.path()) else None

    def split(self, node: RadixNode, num_pages: int) -> RadixNode:
        """Cuts a node in two after its first ``num_pages`` pages and returns the upper half.

        The lower half stays the same object with the same end, so whatever points at the end of a node stays right;
        locks below the cut cover both halves.
        """
        cut = num_pages * self.page_size
        parent = node.parent
        if parent is None:
            raise IntegrityError("the root of a prefix tree was to be split; it has no pages; this is a bug, report it")
        start, tokens, pages = node.start, node.tokens, node.pages
        upper = RadixNode(self, parent, start, tokens[:cut], pages[:num_pages])
        upper.level, upper.stamp, upper.locks = node.level, node.stamp, node.locks
        upper.children[self.key_of(tokens[cut:])] = node
        try:
            node.hold(tokens[cut:], pages[num_pages:])
            node.parent, node.start = upper, upper.end
            parent.children[self._key(upper)] = upper
            return upper
        except BaseException:
            node.hold(tokens, pages)
            node.parent, node.start = parent, start
            parent.children[self._key(node)] = node
            raise

    def trim(self, leaf: RadixNode, num_pages: int) -> Int32:
        """Takes the last ``num_pages`` pages off a leaf, not all of them, and returns them."""
        left = leaf.pages.size - num_pages
        removed = leaf.pages[left:]
        leaf.is_trimmed = True
        leaf.hold(leaf.tokens[: left * self.page_size], leaf.pages[:left])
        return removed

    def detach(self, leaf: RadixNode) -> None:
        """Takes a leaf out of the tree; it keeps its arrays and its parent."""
        if leaf.parent is None or leaf.children:
            raise IntegrityError(
                f"a node with {len(leaf.children)} children was to leave a prefix tree; only a leaf other than the "
                "root may; this is a bug, report it"
            )
        leaf.attached = False
        del leaf.parent.children[self._key(leaf)]

    def put_back(self, leaf: RadixNode, tokens: Int32, pages: Int32) -> None:
        """Undoes a ``trim`` or ``detach`` of a leaf that had these tokens and pages."""
        leaf.hold(tokens, pages)
        leaf.attached = True
        if leaf.parent is not None:
            leaf.parent.children[self._key(leaf)] = leaf

    def mend(self, locks: Mapping[RadixNode, int]) -> None:
        """Works out again what follows from the nodes' pages, children and locked matches, see ``NodeLedger.mend``."""
        for node in (self.root, *self.nodes()):  # parents first
            node.locks, node.attached = locks.get(node, 0), True
            for child in node.children.values():
                child.parent, child.start = node, node.end
        for node in reversed(list(self.nodes())):  # a use that was broken off goes on to the root
            parent = node.parent
            if parent is not None:
                parent.level, parent.stamp = max(parent.level, node.level), max(parent.stamp, node.stamp)

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
            joined = all(
                child.parent is node and child.attached and child.start == node.end and self._key(child) == key
                for key, child in node.children.items()
            )
            filled = node is self.root or node.num_pages > 0
            filled = filled and node.only_page == (node.pages[0] if node.num_pages == 1 else 0)
            below = sum(child.locks for child in node.children.values())
            covered = node is self.root or node.locks >= below
            if not (joined and filled and covered and node.tokens.size == node.num_pages * self.page_size):
                raise IntegrityError(
                    f"the node of pages {node.pages[:4]} after {node.start} pages is wrong: {node.tokens.size} tokens, "
                    f"{node.locks} locks and {below} below, {len(node.children)} children; this is a bug, report it"
                )

    def _shared_pages(self, tokens: Int32, start: int, node: RadixNode) -> int:
        return _common_prefix(tokens[start * self.page_size :], node.tokens) // self.page_size

    def key_of(self, tokens: Int32) -> bytes:
        """The key among children of a node with these tokens."""
        return tokens[: self.page_size].tobytes()

    def _key(self, node: RadixNode) -> bytes:
        return self.key_of(node.tokens)


def joined(runs: list[Int32]) -> Int32:
    """One run after the other; read-only."""
    pages = np.concatenate(runs)
    pages.flags.writeable = False
    return pages


def _as_runs(pages: list[int]) -> list[Int32]:
    return [np.array(pages, np.int32)] if pages else []


def _common_prefix(a: Int32, b: Int32) -> int:
    """How many entries two arrays share from the first on."""
    shorter = min(a.size, b.size)
    differs = a[:shorter] != b[:shorter]
    first = int(differs.argmax()) if shorter else 0
    return first if shorter and differs[first] else shorter
