"""A trie over whole pages of tokens: the prefixes that the host tier has, by scope and group of layers.

An edge is the bytes of one page's tokens, so a lookup compares the tokens of the whole prefix and trusts no hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from engine.memory.integers import Int32
from engine.memory.scope import CacheScope

NOT_HELD = -1


class PageNode:
    """One page of a prefix; it is held while ``row`` has its data, else it is only on the path to others.

    Attributes:
        scope: the scope of the prefix; no two scopes share a node.
        group: the group of layers; no two groups share a node.
        parent: the page before, or the root of scope and group; None for a root.
        key: the bytes of the page's int32 tokens; empty for a root.
        children: the pages that may follow, by key.
        row: row of the tier with its data, or ``NOT_HELD``.
        checksum: CRC-32 of the data, while held.
    """

    __slots__ = ("checksum", "children", "group", "key", "parent", "row", "scope")

    def __init__(self, scope: CacheScope, group: int, parent: PageNode | None, key: bytes) -> None:
        self.scope = scope
        self.group = group
        self.parent = parent
        self.key = key
        self.children: dict[bytes, PageNode] = {}
        self.row = NOT_HELD
        self.checksum = 0

    @property
    def held(self) -> bool:
        """Whether the tier has this page's data."""
        return self.row != NOT_HELD


class PageTrie:
    """The nodes of all scopes.

    Every leaf is held: a node that is neither held nor on the path to a held one is removed at once.

    Args:
        page_size: tokens per page.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._roots: dict[CacheScope, dict[int, PageNode]] = {}  # by group; a scope that is here has a root

    def walk(self, scope: CacheScope, group: int, tokens: Int32) -> list[PageNode]:
        """Returns the nodes of the longest known prefix of ``tokens``, one node per page, the first page first."""
        path: list[PageNode] = []
        root = self._roots.get(scope, {}).get(group)
        children = {} if root is None else root.children
        for key in self._keys(tokens):
            node = children.get(key)
            if node is None:
                break
            path.append(node)
            children = node.children
        return path

    def grow(self, scope: CacheScope, group: int, tokens: Int32) -> list[PageNode]:
        """As ``walk``, adding what is missing; the caller holds the last node, or prunes it."""
        node = self._roots.setdefault(scope, {}).setdefault(group, PageNode(scope, group, None, b""))
        path: list[PageNode] = []
        for key in self._keys(tokens):
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = PageNode(scope, group, node, key)
            path.append(child)
            node = child
        return path

    def prune(self, node: PageNode) -> None:
        """Takes out ``node`` and then its ancestors, as far as they are neither held nor lead to a held node."""
        while not node.held and not node.children:
            if node.parent is None:
                del self._roots[node.scope][node.group]
                if not self._roots[node.scope]:
                    del self._roots[node.scope]
                return
            del node.parent.children[node.key]
            node = node.parent

    def keep_only(self, held: Iterable[PageNode]) -> None:
        """Removes all nodes except these held ones and the paths to them, in any state of the links."""
        kept = dict.fromkeys(held)
        way: dict[PageNode, None] = {}
        for node in kept:
            step: PageNode | None = node
            while step is not None and step not in way:
                way[step] = None
                step = step.parent
        self._roots = {}
        for node in way:
            node.children = {}
            node.row = node.row if node in kept else NOT_HELD
        for node in way:
            if node.parent is not None:
                node.parent.children[node.key] = node
            else:
                self._roots.setdefault(node.scope, {})[node.group] = node

    def nodes(self, scope: CacheScope) -> Iterator[PageNode]:
        """All nodes of a scope but its roots, parents first."""
        pending = [node for root in self._roots.get(scope, {}).values() for node in root.children.values()]
        while pending:
            node = pending.pop()
            yield node
            pending += node.children.values()

    def __contains__(self, scope: CacheScope) -> bool:
        """Whether a scope has a node."""
        return scope in self._roots

    def scopes(self) -> list[CacheScope]:
        """Every scope that has a node."""
        return list(self._roots)

    def _keys(self, tokens: Int32) -> Iterator[bytes]:
        raw, step = tokens.tobytes(), self.page_size * tokens.itemsize
        return (raw[at : at + step] for at in range(0, len(raw) - step + 1, step))


def path_to(node: PageNode) -> list[PageNode]:
    """The nodes from a prefix's first page to ``node``."""
    path = []
    step: PageNode | None = node
    while step is not None and step.parent is not None:
        path.append(step)
        step = step.parent
    return path[::-1]


def tokens_of(path: list[PageNode]) -> Int32:
    """The token ids of a path, int32 ``[len(path) * page_size]``."""
    return np.frombuffer(b"".join(node.key for node in path), np.int32)
