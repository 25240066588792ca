"""The trees of all scopes: which can be reached, and which node of them all is evicted next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from engine.errors import ConfigError, IntegrityError
from engine.memory.integers import Int32, is_integer
from engine.memory.prefix.eviction import EvictionOrder, UseList
from engine.memory.prefix.tree import RadixNode, RadixTree, joined
from engine.memory.scope import CacheScope

Generation = tuple[str, int]  # a model and its weights epoch


class PrefixForest:
    """One radix tree a scope; one eviction order for all trees of a model at one weights epoch.

    That order is the unit of invalidation: retiring it makes every node of the generation unreachable and first to be
    evicted, without visiting any.

    Args:
        page_size: tokens a page.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._trees: dict[CacheScope, RadixTree] = {}
        self._orders: dict[Generation, EvictionOrder[RadixNode]] = {}
        self._tree_counts: Counter[Generation] = Counter()
        self._epochs: dict[str, int] = {}
        self._retired: UseList[RadixNode] = UseList()
        self._retired_order: EvictionOrder[RadixNode] = EvictionOrder()
        self._retired_order.retire(self._retired)
        self._dropped: set[RadixTree] = set()

    def empty(self) -> PrefixForest:
        """A forest without trees that accepts what this one accepts."""
        forest = PrefixForest(self._page_size)
        forest._epochs = dict(self._epochs)
        return forest

    def accepts(self, scope: CacheScope) -> bool:
        """Whether entries of this scope are wanted, its weights not having been replaced."""
        return scope.weights_epoch >= self._epochs.get(scope.model, 0)

    def find(self, scope: CacheScope) -> RadixTree | None:
        """The tree of a scope, if it has one that can be reached."""
        tree = self._trees.get(scope)
        return None if tree is None or tree.order.is_retired else tree

    def plant(self, scope: CacheScope) -> RadixTree:
        """Makes the tree of an accepted scope that has none."""
        generation = (scope.model, scope.weights_epoch)
        order = self._orders.setdefault(generation, EvictionOrder())
        self._tree_counts[generation] += 1
        tree = self._trees[scope] = RadixTree(scope, order, self._page_size)
        return tree

    def clear_away(self, tree: RadixTree) -> None:
        """Forgets a tree, e.g. one that has become empty, and its generation with the last of its trees."""
        self._dropped.discard(tree)
        if self._trees.get(tree.scope) is tree:
            self._forget(tree.scope)

    def put_back(self, tree: RadixTree) -> None:
        """Undoes ``clear_away``, up to what ``mend`` works out."""
        if tree.order is self._retired_order:
            self._dropped.add(tree)
        else:
            self._trees[tree.scope] = tree

    def drop(self, tree: RadixTree) -> list[RadixNode]:
        """Makes a tree unreachable at the cost of a walk through it; what is not locked leaves it.

        Returns:
            The nodes that left.
        """
        free = [node for node in tree.nodes() if node.locks == 0]
        for node in reversed(free):  # children before parents
            tree.order.remove(node)
            tree.detach(node)
        if self._trees.get(tree.scope) is tree:
            self._dropped.add(tree)  # first: no fault loses sight of it
            self._forget(tree.scope)
        tree.order = self._retired_order
        if not tree.root.children:
            self._dropped.discard(tree)
        return free

    def check_epoch(self, model: str, epoch: int) -> None:
        """Refuses with a ConfigError what is no epoch, or one before that of the model."""
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

    def mend(self, locks: Mapping[RadixNode, int]) -> None:
        """Puts trees and eviction orders right after a fault, see ``NodeLedger.mend``."""
        trees = dict.fromkeys(self.trees())
        self._dropped = {tree for tree in self._dropped if tree.root.children}
        kept = [tree for tree in trees if tree.root.children and tree not in self._dropped]
        self._trees = {tree.scope: tree for tree in kept}
        self._orders, self._tree_counts = {}, Counter()
        self._retired, self._retired_order = UseList(), EvictionOrder()
        self._retired_order.retire(self._retired)
        for tree in self.trees():
            tree.mend(locks)
            tree.order = self._retired_order
            if tree not in self._dropped and self.accepts(tree.scope):
                generation = (tree.scope.model, tree.scope.weights_epoch)
                tree.order = self._orders.setdefault(generation, EvictionOrder())
                self._tree_counts[generation] += 1
        unlocked = [node for tree in self.trees() for node in tree.nodes() if node.locks == 0]
        for node in sorted(unlocked, key=lambda node: (node.level, node.stamp, -node.start)):
            node.tree.order.append(node)

    def oldest(self) -> RadixNode | None:
        """The node to be evicted next, a leaf; a constant cost for each generation that can be reached."""
        best = self._retired.oldest()
        if best is None:
            for order in self._orders.values():
                first = order.oldest()
                if first is not None and (best is None or (first.level, first.stamp) < (best.level, best.stamp)):
                    best = first
        return best

    def trees(self) -> Iterator[RadixTree]:
        """Every tree that has nodes, also those that cannot be reached any more."""
        yield from self._trees.values()
        yield from self._dropped

    def runs(self) -> Iterator[tuple[CacheScope, Int32, Int32]]:
        """Every page that can be reached, once, in as few runs of pages as follow one another.

        The longest unused run comes first, and always before the run that it branches off.

        Yields:
            Its scope; the tokens from the start of the sequence to its end, int32; its page ids, int32.
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

    def check_integrity(self) -> None:
        """Proves that every tree joins up and that the eviction orders hold just what is not locked, leaves first.

        Raises:
            IntegrityError: says which page or list is wrong.
        """
        unlocked: set[RadixNode] = set()
        for tree in self.trees():
            tree.check_integrity()
            unlocked.update(node for node in tree.nodes() if node.locks == 0)
        for order in self._orders.values():
            order.check_integrity()
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

    def _forget(self, scope: CacheScope) -> None:
        del self._trees[scope]
        generation = (scope.model, scope.weights_epoch)
        if generation in self._orders:
            self._tree_counts[generation] -= 1
            if not self._tree_counts[generation]:
                del self._orders[generation], self._tree_counts[generation]


def _stamp(node: RadixNode) -> int:
    return node.stamp
