"""In which order cached nodes are evicted, at constant cost per node.

Nodes stand in lists by last use, one list per level, lowest level first. There is no heap and no scan, because three
rules keep the first node of the lowest list a leaf: a use of a node is a use of its ancestors and is entered from the
node upwards; a node's level is never above its parent's; locks cover ancestors, so a node that is missing from the
lists is never below one that stands in them. Hence every child stands before its parent.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Generic, TypeVar

from engine.errors import IntegrityError


class Evictable:
    """A node that can stand in an eviction order, in at most one at a time.

    Attributes:
        level: lower levels are evicted first.
        stamp: logical time of the last use.
        older, newer: the neighbours that are evicted before and after; set only while in a list.
    """

    __slots__ = ("level", "newer", "older", "stamp")
    older: Evictable
    newer: Evictable

    def __init__(self, level: int, stamp: int) -> None:
        self.level = level
        self.stamp = stamp


NodeT = TypeVar("NodeT", bound=Evictable)


class UseList(Generic[NodeT]):
    """A doubly linked list through its members, the longest unused first."""

    __slots__ = ("_end",)

    def __init__(self) -> None:
        self._end = Evictable(0, 0)  # closes the circle: its newer neighbour is the oldest member
        self._end.older = self._end.newer = self._end

    def __iter__(self) -> Iterator[NodeT]:
        node = self._end.newer
        while node is not self._end:
            yield node  # type: ignore[misc]  # only members stand here
            node = node.newer

    def oldest(self) -> NodeT | None:
        """The member to be evicted first."""
        first = self._end.newer
        return None if first is self._end else first  # type: ignore[return-value]

    def append(self, node: NodeT) -> None:
        """Enters a node as the one used last."""
        _link(self._end.older, node, self._end)

    def remove(self, node: NodeT) -> None:
        """Takes a member out."""
        older, newer = node.older, node.newer
        older.newer, newer.older = newer, older
        del node.older, node.newer

    def absorb(self, other: UseList[NodeT]) -> None:
        """Moves the members of another list to the end of this one, in their order, at constant cost."""
        if other.oldest() is not None:
            first, last = other._end.newer, other._end.older
            before = self._end.older
            before.newer, first.older = first, before
            last.newer, self._end.older = self._end, last
            other._end.older = other._end.newer = other._end


class EvictionOrder(Generic[NodeT]):
    """The nodes that may be evicted: one ``UseList`` per level that has a node.

    Once retired it keeps no list of its own: its nodes, and those entered later, stand in the list that it was retired
    to.
    """

    __slots__ = ("_levels", "_lists", "_retired_to")

    def __init__(self) -> None:
        self._levels: list[int] = []  # ascending
        self._lists: dict[int, UseList[NodeT]] = {}
        self._retired_to: UseList[NodeT] | None = None

    @property
    def is_retired(self) -> bool:
        """Whether ``retire`` was called."""
        return self._retired_to is not None

    def __iter__(self) -> Iterator[NodeT]:
        for level in self._levels:
            yield from self._lists[level]

    def oldest(self) -> NodeT | None:
        """The node to be evicted first."""
        return self._lists[self._levels[0]].oldest() if self._levels else None

    def append(self, node: NodeT) -> None:
        """Enters a node as the one of its level that was used last."""
        members = self._retired_to or self._lists.get(node.level)
        if members is None:
            members = self._lists[node.level] = UseList()
            insort(self._levels, node.level)
        members.append(node)

    def insert_after(self, node: NodeT, new: NodeT) -> None:
        """Enters ``new``, of the same level, just after a member."""
        _link(node, new, node.newer)

    def remove(self, node: NodeT) -> None:
        """Takes a member out; its level must be that with which it was entered."""
        members = self._retired_to or self._lists[node.level]
        members.remove(node)
        if members is not self._retired_to and members.oldest() is None:
            del self._lists[node.level]
            del self._levels[bisect_left(self._levels, node.level)]

    def retire(self, to: UseList[NodeT]) -> None:
        """Moves everything to the end of ``to``, in order of eviction, at a constant cost per level, permanently."""
        for level in self._levels:
            to.absorb(self._lists[level])
        self._levels.clear()
        self._lists.clear()
        self._retired_to = to

    def check_integrity(self) -> None:
        """Proves that links, levels and stamps agree; raises IntegrityError if not."""
        if self._levels != sorted(self._lists):
            raise IntegrityError(f"levels {self._levels} are kept for lists of {sorted(self._lists)}; a bug, report it")
        for level, members in self._lists.items():
            stamps = [node.stamp for node in members]
            if not stamps or stamps != sorted(stamps) or any(node.level != level for node in members):
                raise IntegrityError(
                    f"the eviction list of level {level} is empty, or out of order, or holds another level: stamps "
                    f"{stamps[:8]}; this is a bug, report it"
                )


def _link(older: Evictable, node: Evictable, newer: Evictable) -> None:
    node.older, node.newer = older, newer
    older.newer = newer.older = node
