"""The host tier: pages that left the device wait in host memory, keyed as the prefix cache keys them.

Pages that the prefix cache evicts are put here and loaded back when their prefix comes again.
The tokens that a page stands for are compared one by one, and its contents are checked by CRC-32 on the way back.

A page is of one group of layers. Which go first is one order for all groups, by use alone: a prefix that is put or
taken group by group has its pages side by side in that order, so what is useless without another soon follows it.
"""

from __future__ import annotations

import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, IntegrityError, ShapeError
from engine.memory.integers import Bool, Int32, is_integer
from engine.memory.offload.page_format import PageFormat, Pages, PrefixSegment
from engine.memory.offload.page_trie import NOT_HELD, PageNode, PageTrie, path_to, tokens_of
from engine.memory.one_caller import OneCaller
from engine.memory.prefix import checked_scope, token_vector
from engine.memory.scope import CacheScope
from engine.planning.host_memory import require_host_memory


@dataclass
class HostTierCounters:
    """What has happened since the tier was made, in pages.

    Attributes:
        queried_pages: pages that ``get`` was asked for.
        loaded_pages: pages that ``get`` returned; never more than queried.
        stored_pages: pages that ``put`` copied in, without those that were there already.
        evicted_pages: pages dropped to keep the budget.
        rejected_pages: pages dropped because their checksum did not match.
    """

    queried_pages: int = 0
    loaded_pages: int = 0
    stored_pages: int = 0
    evicted_pages: int = 0
    rejected_pages: int = 0


class HostTier:
    """Pages in host memory under a byte budget; the least recently used are evicted first.

    A page of full attention is never more recently used than the pages before it in its prefix, so a prefix is evicted
    from its end. A page of a windowed group is used without those before its window: that the end of a sequence is used
    says nothing for them. The page at position ``i`` can be held without those before it, which are then on the device,
    or behind the window.

    Args:
        budget_bytes: most bytes of page data; the index (tokens and one node per page) comes on top.
        page_format: format of the pages; ``page_format.require_same`` tells whether another pool may share the tier.

    Raises:
        ConfigError: the budget is not an integer, does not hold one page, or is more memory than the machine has
            available.
    """

    def __init__(self, budget_bytes: int, page_format: PageFormat) -> None:
        if not isinstance(page_format, PageFormat):
            raise ConfigError(f"page_format is a {type(page_format).__name__}; it must be a PageFormat")
        if not is_integer(budget_bytes):
            raise ConfigError(f"the budget of a host tier is {budget_bytes!r}; it must be an integer of bytes")
        self.page_format = page_format
        self.caller = OneCaller()
        self.capacity_pages = budget_bytes // page_format.page_bytes
        if self.capacity_pages < 1:
            raise ConfigError(
                f"a host tier of {budget_bytes} bytes holds no page: one is {page_format.page_bytes} bytes; raise the "
                "budget or do without the tier"
            )
        require_host_memory(budget_bytes, f"a host tier of {budget_bytes} bytes", "lower the budget")
        try:
            # Untouched memory costs nothing yet: the system backs a row when it is first written.
            self._slab = np.empty((self.capacity_pages, *page_format.page_shape), page_format.dtype)
        except (MemoryError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"cannot reserve {budget_bytes} bytes of host memory for the host tier; lower it"
            ) from error
        self.counters = HostTierCounters()
        self.clear()

    @property
    def held_pages(self) -> int:
        """Pages held now."""
        return len(self._used)

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages held now."""
        return self.held_pages * self.page_format.page_bytes

    @property
    def capacity_bytes(self) -> int:
        """Most bytes of pages held."""
        return self.capacity_pages * self.page_format.page_bytes

    def holds(self, scope: CacheScope) -> bool:
        """Whether any page of ``scope`` is held, of any group; it costs as much as one look into a dict."""
        return scope in self._trie

    def held(self, scope: CacheScope, token_ids: npt.ArrayLike, *, group: int = 0) -> Bool:
        """Says which pages of a sequence are held, and changes nothing: it is no use of them.

        Args:
            scope: the scope of the sequence.
            token_ids: the sequence, or as much of it as may be taken from a cache.
            group: the group of layers.

        Returns:
            ``[whole pages of token_ids]``.

        Raises:
            ShapeError: ``token_ids`` are not integers, or there is no such group.
        """
        tokens = self._check_query(scope, token_ids, 0, group)
        known = [node.held for node in self._trie.walk(scope, group, tokens)]
        pages = np.zeros(tokens.size // self.page_format.page_size, np.bool_)
        pages[: len(known)] = known
        return pages

    def put(self, scope: CacheScope, token_ids: npt.ArrayLike, first_page: int, data: Pages, group: int = 0) -> int:
        """Copies pages in, making room by dropping the least recently used ones.

        Pages that are here already are kept as they are. Of more pages than the budget holds the first are taken.

        Args:
            scope: the scope of the prefix, as in the prefix cache.
            token_ids: every token from the start of the sequence to the end of the last page.
            first_page: how many pages of the prefix come before ``data``.
            data: ``[n, layers, page_size, 2H, D]``.
            group: the group of layers whose pages they are.

        Returns:
            How many pages are new here.

        Raises:
            ShapeError: the parts do not fit together or do not have this tier's page format; there is no such group.
        """
        self.caller.enter()
        checked_scope(scope)
        group = self.page_format.checked_group(group)
        tokens = self.page_format.check_pages(token_ids, first_page, data)
        taken = min(len(data), self.capacity_pages)
        if not taken:
            return 0
        stored_before, missing = self.counters.stored_pages, list[PageNode]()
        try:
            prefix = tokens[: (first_page + taken) * self.page_format.page_size]
            here = _held(self._trie.walk(scope, group, prefix)[first_page:])
            self._touch(here)  # so that making room spares them
            self._make_room(taken - len(here))
            path = self._trie.grow(scope, group, prefix)  # not before: making room prunes what leads to no held page
            missing = _held(path[first_page:], wanted=False)
            for node, page in zip(path[first_page:], data, strict=False):
                if not node.held:
                    self._store(node, page)
            self._touch_use(path, first_page)
            self.counters.stored_pages = stored_before + len(missing)
            return len(missing)
        except BaseException:
            self.counters.stored_pages = stored_before
            for node in missing:
                self._used.pop(node, None)
            self._mend()
            raise

    def get(self, scope: CacheScope, token_ids: npt.ArrayLike, start_page: int, *, group: int = 0) -> Pages:
        """Returns a fresh copy of the consecutive pages held from ``start_page`` on, counts them and notes their use.

        A page whose checksum does not match is dropped and counted, and ends the run.

        Args:
            scope: the scope of the prefix.
            token_ids: the sequence, or as much of it as may be taken from a cache; its whole pages count. Call it once
                per request and group.
            start_page: how many pages of it need not come from here.
            group: the group of layers.

        Returns:
            ``[n, layers, page_size, 2H, D]``, n ≥ 0: as many as ``held`` said, unless something was put or rejected
            since.

        Raises:
            ShapeError: ``token_ids`` are not integers, or have fewer than ``start_page`` whole pages; there is no such
                group.
        """
        tokens, counted = self._check_query(scope, token_ids, start_page, group), self.counters
        before = counted.queried_pages, counted.loaded_pages
        try:
            path = self._held_path(scope, group, tokens, start_page)
            data = self._load(path[start_page:])
            self._touch_use(path[: start_page + len(data)], start_page)
            counted.queried_pages += tokens.size // self.page_format.page_size - start_page
            counted.loaded_pages += len(data)
            return data
        except BaseException:
            counted.queried_pages, counted.loaded_pages = before
            self._mend()
            raise

    def reset(self, scope: CacheScope | None = None) -> None:
        """Drops every page of ``scope``, or of all scopes; counters stay."""
        self.caller.enter()
        wanted = None if scope is None else checked_scope(scope)
        try:
            for each in self._trie.scopes() if wanted is None else [wanted]:
                for node in _held(self._trie.nodes(each)):
                    self._drop(node)
        except BaseException:  # completes the change
            for node in list(self._used):
                if wanted in (None, node.scope):
                    del self._used[node]
            self._mend()
            raise

    def clear(self) -> None:
        """Drops every page, in any state of the tier; counters stay."""
        self.caller.enter()
        self._trie = PageTrie(self.page_format.page_size)
        self._used: OrderedDict[PageNode, None] = OrderedDict()  # held pages, the least recently used first
        self._free_rows = list(range(self.capacity_pages))

    def segments(self, most_pages: int | None = None) -> Iterator[PrefixSegment]:
        """All pages, as the longest unbranched runs of one group in order of use, the least recently used run first.

        Put into another tier in this order they are all there again, or the most recently used ones if it is smaller.
        The tier must not be changed between the items.

        Args:
            most_pages: most pages of one item; a longer run comes in several, its end first. None is no bound.
        """
        recency = {node: rank for rank, node in enumerate(self._used)}
        heads = [node for node in self._used if not _goes_on(node, recency)]
        for head in heads:
            run = [head]
            while len(run[-1].children) == 1 and _goes_on(child := next(iter(run[-1].children.values())), recency):
                run.append(child)
            size = most_pages or len(run)
            for start in reversed(range(0, len(run), size)):
                try:
                    data = self._load(run[start : start + size])
                except BaseException:
                    self._mend()
                    raise
                if len(data):
                    path = path_to(run[start + len(data) - 1])
                    yield PrefixSegment(head.scope, tokens_of(path), len(path) - len(data), data, head.group)

    def _check_query(self, scope: CacheScope, token_ids: npt.ArrayLike, start_page: int, group: int) -> Int32:
        self.caller.enter()
        checked_scope(scope)
        self.page_format.checked_group(group)
        tokens = token_vector(token_ids)
        whole = tokens.size // self.page_format.page_size
        if not is_integer(start_page) or not 0 <= start_page <= whole:
            raise ShapeError(
                f"start_page={start_page!r} is not within the {whole} whole pages of {tokens.size} tokens at "
                f"page_size={self.page_format.page_size}"
            )
        return tokens

    def _held_path(self, scope: CacheScope, group: int, tokens: Int32, start_page: int) -> list[PageNode]:
        """The path to the last of the held pages that follow ``start_page`` without a gap; empty if there is none."""
        path = self._trie.walk(scope, group, tokens)
        end = start_page
        while end < len(path) and path[end].held:
            end += 1
        return path[:end] if end > start_page else []

    def _is_full(self, node: PageNode) -> bool:
        return self.page_format.windows[node.group] is None

    def _touch_use(self, path: list[PageNode], first_page: int) -> None:
        """Notes that pages from ``first_page`` on are used, and with full attention those before them."""
        self._touch(path if path and self._is_full(path[-1]) else path[first_page:])

    def _touch(self, path: list[PageNode]) -> None:
        pages = _held(reversed(path))  # the last page first, so that a prefix is evicted from its end
        try:
            for node in pages:
                self._used.move_to_end(node)
        except BaseException:  # to the end: half of it is an order that no use has made
            for node in pages:
                self._used.move_to_end(node)
            raise

    def _make_room(self, pages: int) -> None:
        while len(self._free_rows) < pages:
            self._drop(next(iter(self._used)))
            self.counters.evicted_pages += 1

    def _store(self, node: PageNode, page: Pages) -> None:
        node.row = self._free_rows.pop()
        node.checksum = _checksum(page)
        self._slab[node.row] = page
        self._used[node] = None

    def _load(self, run: list[PageNode]) -> Pages:
        # An admission finds nothing as a rule, and NumPy is slow to index by an empty list.
        data = self._slab[[node.row for node in run]] if run else self._slab[:0]
        for index, node in enumerate(run):
            if _checksum(data[index]) != node.checksum:
                self._drop(node)
                self.counters.rejected_pages += 1
                return data[:index]
        return data

    def _drop(self, node: PageNode) -> None:
        del self._used[node]
        self._free_rows.append(node.row)
        node.row = NOT_HELD
        self._trie.prune(node)

    def is_sound(self) -> bool:
        """Whether ``check_integrity`` passes."""
        try:
            self.check_integrity()
        except Exception:  # a broken index breaks the check itself in any way
            return False
        return True

    def _mend(self) -> None:
        """Derives everything else from the held nodes, their rows and their order, after a fault half way.

        With full attention an interrupted use of a page counts as a use of the pages before it too.
        """
        self._trie.keep_only(self._used)
        last_use: dict[PageNode, tuple[int, int]] = {}
        for rank, node in reversed(list(enumerate(self._used))):
            step: PageNode | None = node
            while step is not None and step not in last_use:
                last_use[step] = rank, len(last_use)
                step = step.parent if self._is_full(step) else None
        self._used = OrderedDict.fromkeys(sorted(self._used, key=last_use.__getitem__))
        taken = {node.row for node in self._used}
        self._free_rows = [row for row in range(self.capacity_pages) if row not in taken]

    def check_integrity(self) -> None:
        """Proves that every row is free or held, once, and that index and recency agree.

        Raises:
            IntegrityError: they do not; the message names the rows or the page.
        """
        counts = Counter([*self._free_rows, *(node.row for node in self._used)])
        wrong = [row for row in range(self.capacity_pages) if counts.pop(row, 0) != 1] + list(counts)
        if wrong:
            raise IntegrityError(
                f"rows {wrong[:8]} of {self.capacity_pages} in the host tier are not free or held once"
            )
        known = [node for scope in self._trie.scopes() for node in self._trie.nodes(scope)]
        if {node for node in known if node.held} != set(self._used):
            raise IntegrityError(f"the host tier holds {self.held_pages} pages, but its index says otherwise")
        recency = {node: rank for rank, node in enumerate(self._used)}
        for node in known:
            *before, _ = path_to(node)
            if not node.held and not node.children:
                raise IntegrityError(f"page {len(before)} of a prefix is indexed in the host tier and leads nowhere")
            in_order = node.held and self._is_full(node)
            if in_order and any(each.held and recency[each] < recency[node] for each in before):
                raise IntegrityError(f"page {len(before)} of a prefix would outlive one before it in the host tier")


def _held(nodes: Iterable[PageNode], *, wanted: bool = True) -> list[PageNode]:
    """Those of the nodes that are held, or not."""
    return [node for node in nodes if node.held is wanted]


def _goes_on(node: PageNode, recency: dict[PageNode, int]) -> bool:
    """Whether a held page follows the one before it in a run: that one is held, leads nowhere else and goes later."""
    before = node.parent
    if before is None or not before.held or len(before.children) > 1:
        return False
    return node.held and recency[before] > recency[node]


def _checksum(page: Pages) -> int:
    # CRC-32 finds every change of up to 32 consecutive bits; zlib's runs at gigabytes per second and frees the GIL.
    return zlib.crc32(np.ascontiguousarray(page).reshape(-1).view(np.uint8).data)
