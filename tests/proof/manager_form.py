"""The form of a ManagerWorld: everything that later calls can depend on, with pages and rows renamed.

Pages and rows are numbered in the order in which this file meets them, so that worlds which differ by the numbers of
pages and rows alone are one. That is sound because no decision of the control plane depends on such a number, with one
exception: where several window pages of one call become idle together, the smaller page number stands first in the
order of eviction; there one of these orders is visited and the others are not.

Logical times are kept as ranks: code only compares them, and a new one is later than all. Left out are

    counters of queries, hits, evictions and of the host tier      no decision reads them
    births and clock of the page pool, arrays that were handed out they tell stale slots; the manager passes pages
    the order of free pages and of free rows                       which of the free ones comes next is a renaming
    generation and membership of rows, the number of changes       only compared with marks, of which it is kept
                                                                   whether they are still good
    times of locked nodes, and of entries that are not idle        set anew before they are read
    what stands in the device's table beyond the pages told        sent again before it is read
    order of dictionaries                                          none decides; eviction has orders of its own
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from engine.memory.page_moves import PageCopy, PageLoad

if TYPE_CHECKING:
    from manager_world import ManagerWorld, Sequence

    from engine.memory.manager import CacheManager


class Names:
    """Numbers for pages, in the order in which they are asked for; the null page is 0."""

    def __init__(self) -> None:
        self.known = {0: 0}

    def of(self, pages: Any) -> tuple[int, ...]:
        known = self.known
        return tuple([known.setdefault(page, len(known)) for page in np.asarray(pages).reshape(-1).tolist()])


def manager_form(world: ManagerWorld) -> tuple[Any, ...]:
    names, cache = Names(), world.cache
    sequences = sorted(world.sequences, key=lambda each: (_own(each), _plain_row(cache, each.row)))
    order = [each.row for each in sequences]
    rows = [(_own(each), row_form(cache, each.row, names)) for each in sequences]
    forest, nodes = forest_form(cache, names)
    handles: dict[int, int] = {}
    leases = [lease_form(cache, row, nodes, handles, names) for row in order]
    entries = entries_form(cache, nodes, names)
    moves = [_move_form(move, names) for move in cache._moves]
    saves = [(s.epoch, s.tokens, s.first_page, s.group, tuple(map(tuple, s.data))) for s in world.saves]
    return (
        world.epoch, tuple(rows), tuple(leases), forest, entries, tuple(moves), tuple(saves), _tier_form(cache),
        pages_form(cache, world.content, names), _wrong_rows(world), marks(cache, order),
    )  # fmt: skip


def _own(each: Sequence) -> tuple[Any, ...]:
    return each.epoch, each.tokens, each.written, each.is_forgotten, tuple(each.flights)


def _plain_row(cache: CacheManager, row: int) -> tuple[Any, ...]:
    table, lease = cache.page_table, cache._leases[row]
    columns = (table._granted, table._computed, table._known, table._most, table._told)
    counts = tuple([column.item(row) for column in columns])
    return counts, tuple(table._first[row].tolist()), lease.priority, lease.was_reset, lease.match.num_tokens


def row_form(cache: CacheManager, row: int, names: Names) -> tuple[Any, ...]:
    """A row's counts and pages, and whether anything stands beyond these."""
    table = cache.page_table
    count = -(-table._granted.item(row) // table.page_size)
    beyond = bool(table._table[row, :, count:].any())
    return _plain_row(cache, row), names.of(table._table[row, :, :count]), beyond


def marks(cache: CacheManager, rows: list[int]) -> tuple[Any, ...]:
    """Which of the table's marks are still good, and of which rows; and what the table has put aside for them."""
    table = cache.page_table
    order = {row: at for at, row in enumerate(rows)}

    def rows_of(mark: Any) -> tuple[Any, ...] | None:
        if mark is None or mark[0] != table.membership:
            return None
        return tuple(order[row] for row in np.frombuffer(mark[2], mark[1]).tolist())

    told, added = table._told_at, table._added_at
    return (
        rows_of(table._checked_at),
        rows_of(told[1]) if told and told[0] == table._changes else None,
        (rows_of(added[1]), len(table._added[0])) if added and added[0] == table._changes else None,
    )


def lease_form(cache: CacheManager, row: int, nodes: dict[int, int], handles: dict[int, int], names: Names) -> Any:
    """What a row has locked, and through which handle: rows may share one."""
    match = cache._leases[row].match
    handle = handles.setdefault(id(match), len(handles))
    node = None if match.node is None else nodes.get(id(match.node), "gone")
    return handle, match.locks, node, match.num_tokens, names.of(match.pages)


def forest_form(cache: CacheManager, names: Names) -> tuple[Any, dict[int, int]]:
    """The trees and the orders of eviction; and the number of each node."""
    prefix = cache.prefix
    forest, groups = prefix._forest, prefix._groups
    idle = [] if groups is None else [*groups._cold, *groups._warm]
    unlocked = [node for tree in forest.trees() for node in tree.nodes() if not node.locks]
    rank = {stamp: at for at, stamp in enumerate(sorted({each.stamp for each in [*unlocked, *idle]}))}
    nodes: dict[int, int] = {}

    def node_form(node: Any) -> tuple[Any, ...]:
        nodes[id(node)] = len(nodes)
        below = sorted(node.children.values(), key=lambda child: child.tokens.tobytes())
        time = -1 if node.locks or node.parent is None else rank[node.stamp]
        own = (node.tokens.tobytes(), names.of(node.pages), names.of([node.only_page]), node.locks, node.level, time)
        return (*own, node.start, node.is_trimmed, node.attached, tuple([node_form(child) for child in below]))

    def tree_form(tree: Any) -> tuple[Any, ...]:
        return tree.scope.weights_epoch, tree.order.is_retired, node_form(tree.root)

    kept = sorted(forest._trees.values(), key=lambda tree: tree.scope.weights_epoch)
    dropped = sorted(forest._dropped, key=lambda tree: _first_times(tree, rank, names))
    trees = tuple([tree_form(tree) for tree in kept]), tuple([tree_form(tree) for tree in dropped])
    orders = tuple(
        (key[1], tuple((level, tuple([nodes[id(node)] for node in order._lists[level]])) for level in order._levels))
        for key, order in sorted(forest._orders.items())
    )
    retired = tuple([nodes[id(node)] for node in forest._retired])
    counts = forest.evictable, forest.protected, tuple(sorted(forest._epochs.items()))
    generations = tuple(sorted((key[1], count) for key, count in forest._tree_counts.items()))
    warm = (
        ()
        if groups is None
        else (_idle_form(groups._cold, rank, groups, names), _idle_form(groups._warm, rank, groups, names))
    )
    return (trees, orders, retired, counts, generations, warm), nodes


def _first_times(tree: Any, rank: dict[int, int], names: Names) -> tuple[Any, ...]:
    """Tells dropped trees apart, as far as that is easy; where it does not, equal worlds may be visited twice."""
    nodes = sorted(tree.nodes(), key=lambda node: (node.start, node.tokens.tobytes()))
    plain = [(n.tokens.tobytes(), n.locks, rank.get(n.stamp, -1)) for n in nodes]
    return tree.scope.weights_epoch, plain, [[names.known.get(page, 99) for page in n.pages.tolist()] for n in nodes]


def _idle_form(order: Any, rank: dict[int, int], groups: Any, names: Names) -> tuple[Any, ...]:
    return tuple(
        (each.level, rank[each.stamp], each.num_pages, each.is_warm, names.of(groups._table[:, each.entry]))
        for each in order
    )


def entries_form(cache: CacheManager, nodes: dict[int, int], names: Names) -> tuple[Any, ...] | None:
    """Where there are windows, what the prefix cache knows of each page of tokens."""
    groups = cache.prefix._groups
    if groups is None:
        return None
    forms = []
    for tree in cache.prefix._forest.trees():
        for node in sorted(tree.nodes(), key=lambda node: nodes[id(node)]):
            for at, entry in enumerate(node.pages.tolist()):
                end, column = groups._ends[entry], int(groups._column[entry])
                flags = bool(groups._is_used[entry]), bool(groups._is_end[entry]), bool(groups._is_near[entry])
                # Where the node that an entry remembers has left the tree, its tokens are what is read of it.
                place: Any = None if end is None else nodes.get(id(end))
                if end is not None and place is None:
                    place = end.tree.prefix_tokens(end).tobytes()
                forms.append(
                    (nodes[id(node)], at, names.of(groups._table[:, entry]), int(groups._level[entry]), column, flags,
                     place, entry in groups._idle)
                )  # fmt: skip
    stray = np.count_nonzero(groups._table) - sum(np.count_nonzero(form[2]) for form in forms)
    return tuple(forms), int(stray), groups.idle_pages, groups.window_pages


def _move_form(move: Any, names: Names) -> tuple[Any, ...]:
    if isinstance(move, PageLoad):
        return "load", names.of(move.pages), np.asarray(move.data).tobytes()
    if isinstance(move, PageCopy):
        return "copy", names.of(move.sources), names.of(move.targets)
    tokens = move.token_ids.tobytes()
    return "save", move.scope.weights_epoch, tokens, move.first_page, move.group, names.of(move.pages)


def _tier_form(cache: CacheManager) -> tuple[Any, ...] | None:
    tier = cache.host_tier
    if tier is None:
        return None
    forms = []
    for node in tier._used:
        key, step = [], node
        while step is not None:
            key.append(step.key)
            step = step.parent
        forms.append((node.scope.weights_epoch, node.group, tuple(key), tier._slab[node.row].tobytes()))
    return tuple(forms), len(tier._free_rows)


def pages_form(cache: CacheManager, content: list[list[float]], names: Names) -> tuple[Any, ...]:
    """Of each page its holders, how often it is free, whether it is cached, and what it holds; and the rows."""
    pool, known, table = cache.allocator.pages, names.known, cache.page_table
    free = np.bincount(pool._free.all(), minlength=len(content)).tolist()
    holders, is_cached = pool._ref_count.tolist(), cache.prefix._is_cached.tolist()
    forms = [
        (known.get(page, 99), holders[page], free[page], is_cached[page], tuple(slots))
        for page, slots in enumerate(content)
    ]
    return tuple(sorted(forms)), int(table._in_use.sum()), len(table._free_rows)


def _wrong_rows(world: ManagerWorld) -> tuple[int, ...]:
    """The rows of which the device has another page than it was told."""
    table = world.cache.page_table
    wrong = []
    for each in world.sequences:
        pages = table.pages_by_group(each.row)[:, : table._told.item(each.row)]
        if ((world.device_table[each.row, :, : pages.shape[1]] != pages) & (pages > 0)).any():
            wrong.append(each.row)
    return tuple(wrong)
