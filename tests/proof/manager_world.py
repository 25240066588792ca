"""The shipped CacheManager in a small scope, with a pool of numbers in place of keys and values.

Each slot that a step writes gets the number of the prefix that it was computed from, so whatever reads a slot can say
whether it holds the right thing. A slot that nothing may be read from holds ``POISON``: slots of free pages, and those
of a row's pages that no step has written, are poisoned after every move.

A step is dispatched, which makes the page moves planned so far and writes its slots, and committed, which books its
tokens; in a scope that is ``late`` the two are moves of their own, so anything may come between them. In a scope that
is ``split`` so are the granting of slots and the dispatch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from manager_form import manager_form
from snapshots import keep_as_they_are

from engine.errors import KVPoolExhausted
from engine.memory.manager import CacheManager
from engine.memory.offload.host_tier import HostTier
from engine.memory.offload.page_format import PageFormat
from engine.memory.page_moves import PageCopy, PageLoad
from engine.memory.scope import CacheScope, LayoutKey

POISON = -1.0
LAYOUT = LayoutKey.of({"version": 1})
SCOPES = tuple(CacheScope("model", epoch, None, "", LAYOUT) for epoch in range(4))

Prefix = tuple[int, int, tuple[int, ...]]  # epoch, group, tokens
_numbers: dict[Prefix, float] = {}


def number_of(epoch: int, group: int, tokens: tuple[int, ...]) -> float:
    """What the slot of a prefix's last token holds in a group."""
    return _numbers.setdefault((epoch, group, tokens), float(len(_numbers)))


@dataclass(frozen=True)
class ManagerScope:
    """How small the world is.

    Attributes:
        pages: pages of the pool.
        page_size: tokens of a page.
        requests: rows.
        context: most tokens of a row.
        prompts: what requests may come with.
        windows: as of the manager.
        policy: as of the manager.
        host_pages: pages of the host tier; 0 is none.
        epochs: how often the weights are replaced.
        late: whether steps are committed later than they are dispatched, one of all requests at most.
        split: whether steps are dispatched later than they get their slots.
        pending: most page moves, and most saves, that are put off; beyond that they are made.
        without: moves that are left out, by name.
        tokens: tokens that a request may go on with.
    """

    pages: int
    page_size: int
    requests: int
    context: int
    prompts: tuple[tuple[int, ...], ...]
    windows: tuple[int | None, ...] = (None,)
    policy: Any = "lru"
    host_pages: int = 0
    epochs: int = 0
    late: bool = False
    split: bool = False
    pending: int = 1
    without: tuple[str, ...] = ()
    tokens: tuple[int, ...] = (0, 1)


@dataclass(eq=False)
class Sequence:
    """A running request.

    Attributes:
        row: its row.
        epoch: that of its scope.
        tokens: what it knows.
        written: how many of its tokens a dispatched step has written, or a cached page or planned move brings.
        is_forgotten: whether the cache was reset since it came.
        flights: of each step that is not committed, how many tokens will be computed.
    """

    row: int
    epoch: int
    tokens: tuple[int, ...]
    written: int
    is_forgotten: bool = False
    flights: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Save:
    """Evicted pages whose contents, a list for each, have been read and are not in the host tier yet."""

    epoch: int
    tokens: tuple[int, ...]
    first_page: int
    group: int
    data: list[list[float]]


keep_as_they_are(ManagerScope)


class ManagerWorld:
    def __init__(self, scope: ManagerScope) -> None:
        self.scope = scope
        windows, size = scope.windows, scope.page_size
        self.cache = CacheManager(
            scope.pages * size, size, scope.requests, scope.context, policy=scope.policy, windows=windows
        )
        descriptor = {"page_size": size, "head_num": 1, "head_dim": 1, "dtype": "float32", "version": 1}
        page_format = PageFormat(1, np.dtype(np.float32), descriptor, windows)
        if scope.host_pages:
            self.cache.attach_host_tier(HostTier(scope.host_pages * page_format.page_bytes, page_format))
        self.content = [[POISON] * size for _ in range(scope.pages + 1)]  # by page and offset
        table = self.cache.page_table
        self.device_table = np.zeros((scope.requests, table.num_groups, table.max_pages), np.int32)
        self.sequences: list[Sequence] = []
        self.saves: list[Save] = []
        self.epoch = 0

    # What can be done.

    def moves(self) -> list[tuple[Any, ...]]:
        scope, table = self.scope, self.cache.page_table
        found: list[tuple[Any, ...]] = []
        if table.available_rows:
            found += [("admit", prompt) for prompt in scope.prompts]
        may_run = not any(each.flights for each in self.sequences)
        for index, each in enumerate(self.sequences):
            granted, computed = table.kv_len(each.row), table.computed_len(each.row)
            if granted == each.written and (scope.split or may_run):
                if granted < len(each.tokens):
                    found.append(("grow", index, None))
                elif granted < scope.context:
                    found += [("grow", index, token) for token in scope.tokens]
            if granted > each.written and may_run:
                found.append(("run", index))
            if each.flights:
                found.append(("commit", index))
            found += [("truncate", index, tokens) for tokens in range(granted) if self._sees(each.row, tokens)]
            if computed >= scope.page_size:
                found.append(("publish", index))
                found.append(("release", index, False))
            if table.available_rows:
                found += [("fork", index, tokens) for tokens in range(computed + 1)]
            if computed == granted and granted < len(each.tokens):
                found.append(("share", index))
            if table.has_windows:
                found.append(("leave", index))
            found.append(("release", index, True))
        if self.cache.prefix.evictable_pages:
            found.append(("evict",))
        if self.cache._moves:
            found.append(("move",))
        if self.saves:
            found.append(("land",))
        if self.cache.prefix.cached_pages or (self.cache.host_tier and self.cache.host_tier.held_pages) or self.saves:
            found.append(("reset",))
        if self.epoch < scope.epochs:
            found.append(("epoch",))
        return [move for move in found if move[0] not in scope.without]

    def play(self, move: tuple[Any, ...]) -> bool:
        is_refused: bool = getattr(self, "_" + move[0])(*move[1:])
        if len(self.cache._moves) > self.scope.pending:
            self._make_moves()
        if len(self.saves) > self.scope.pending:
            self._land()
        self._poison()
        return is_refused

    # Requests.

    def _admit(self, prompt: tuple[int, ...]) -> bool:
        cache, tokens, scope = self.cache, np.array(prompt, np.int32), SCOPES[self.epoch]
        found = cache.cached_tokens(scope, tokens)
        before = cache.prefix.query_tokens, cache.prefix.hit_tokens
        admission = cache.admit(scope, tokens)
        if admission is None:
            assert self.sequences, "a request that is alone is not admitted"
            assert (cache.prefix.query_tokens, cache.prefix.hit_tokens) == before, "a refused request was counted"
            return False  # it counts as a use of what was found
        cached, loaded = admission.cached_tokens, admission.loaded_tokens
        assert cached + loaded < len(prompt), "no token is left to compute"
        if cache.shares_prefixes:
            # A hit counts what the device has, where a load may begin before its end.
            assert cache.prefix.query_tokens - before[0] == len(prompt)
            assert cached <= cache.prefix.hit_tokens - before[1] <= cached + loaded
        if not self.scope.host_pages:
            assert (cached, loaded) == (found, 0), "what was found is not what is shared"
        assert cache.page_table.kv_len(admission.row) == cached + loaded
        self.sequences.append(Sequence(admission.row, self.epoch, prompt, cached + loaded))
        return False

    def _fork(self, index: int, tokens: int) -> bool:
        parent = self.sequences[index]
        if not self._sees(parent.row, tokens) or not self.cache.can_fork(parent.row, tokens):
            return True
        row = self.cache.fork(parent.row, tokens)
        child = Sequence(row, parent.epoch, parent.tokens[:tokens], tokens, parent.is_forgotten)
        self.sequences.append(child)
        assert self.cache.page_table.computed_len(row) == tokens
        return False

    def _share(self, index: int) -> bool:
        each = self.sequences[index]
        before = self.cache.page_table.kv_len(each.row)
        shared = self.cache.share(each.row, SCOPES[each.epoch], np.array(each.tokens, np.int32))
        each.written = before + shared
        assert each.written < len(each.tokens), "no token is left to compute"
        assert self.cache.page_table.computed_len(each.row) == each.written
        return False

    def _grow(self, index: int, token: int | None) -> bool:
        each, table = self.sequences[index], self.cache.page_table
        granted = table.kv_len(each.row)
        tokens = each.tokens if token is None else (*each.tokens, token)
        rows, counts = np.array([each.row], np.int32), len(tokens) - granted
        has_room = self.cache.has_room_to_grow(rows, counts)
        try:
            self.cache.grow(rows, counts)
        except KVPoolExhausted:
            assert not has_room, "room was promised"
            return True
        assert has_room, "room was denied"
        each.tokens = tokens
        if not self.scope.split:
            self._run(index)
        return False

    def _run(self, index: int) -> bool:
        """Dispatches a step of the tokens of a request that have slots and are not written."""
        each, table, size = self.sequences[index], self.cache.page_table, self.scope.page_size
        self._make_moves()
        places, pages = table.take_new_pages(np.array([each.row], np.int32))
        self.device_table.reshape(-1)[places] = pages
        start, stop = each.written, table.kv_len(each.row)
        for group, window in enumerate(self.scope.windows):
            held = self.device_table[each.row, group].tolist()
            for position in range(0 if window is None else max(0, start - window + 1), start):
                number = self.content[held[position // size]][position % size]
                right = number_of(each.epoch, group, each.tokens[: position + 1])
                assert number == right, f"position {position} reads what is not its prefix"
            for position in range(start, stop):
                page = held[position // size]
                assert page > 0, "a token is written to the null page"
                assert self.cache.allocator.pages.ref_count([page])[0] == 1, "a shared page is written"
                self.content[page][position % size] = number_of(each.epoch, group, each.tokens[: position + 1])
        each.written = stop
        each.flights.append(stop)
        if not self.scope.late:
            self._commit(index)
        return False

    def _commit(self, index: int) -> bool:
        each = self.sequences[index]
        self.cache.mark_computed([each.row], [each.flights.pop(0)])
        return False

    def _truncate(self, index: int, tokens: int) -> bool:
        each = self.sequences[index]
        try:
            self.cache.truncate(each.row, tokens)
        except KVPoolExhausted:
            return True
        each.tokens, each.written = each.tokens[:tokens], min(each.written, tokens)
        each.flights = [min(end, tokens) for end in each.flights]
        if not tokens:
            each.tokens = (0,)  # it goes on as another request would
        return False

    def _publish(self, index: int) -> bool:
        each, before = self.sequences[index], self.cache.prefix.cached_pages
        self.cache.publish(each.row, SCOPES[each.epoch], np.array(each.tokens, np.int32))
        if each.is_forgotten or each.epoch < self.epoch:
            assert self.cache.prefix.cached_pages == before, "what was to be forgotten is cached"
        return False

    def _leave(self, index: int) -> bool:
        self.cache.leave_behind([self.sequences[index].row])
        return False

    def _release(self, index: int, keeps: bool) -> bool:
        each, before = self.sequences.pop(index), self.cache.prefix.cached_pages
        tokens = each.tokens if keeps else ()
        self.cache.release(each.row, SCOPES[each.epoch], np.array(tokens, np.int32))
        if each.is_forgotten or each.epoch < self.epoch or not keeps:
            assert self.cache.prefix.cached_pages == before, "what was to be forgotten is cached"
        return False

    # The cache as a whole.

    def _evict(self) -> bool:
        before = self.cache.prefix.evictable_pages
        assert self.cache.prefix.evict(1) >= 1, "a page that counts as evictable is not evicted"
        assert self.cache.prefix.evictable_pages < before
        return False

    def _move(self) -> bool:
        self._make_moves()
        return False

    def _land(self) -> bool:
        tier = self.cache.host_tier
        assert tier is not None
        for save in self.saves:
            data = np.repeat(np.array(save.data, np.float32)[:, None, :, None, None], 2, axis=3)
            tier.put(SCOPES[save.epoch], np.array(save.tokens, np.int32), save.first_page, data, save.group)
        self.saves = []
        return False

    def _reset(self) -> bool:
        self.cache.reset_prefix_cache()
        self.saves = []
        for each in self.sequences:
            each.is_forgotten = True
        return False

    def _epoch(self) -> bool:
        self.epoch += 1
        self.cache.prefix.raise_weights_epoch("model", self.epoch)
        return False

    def _make_moves(self) -> None:
        for move in self.cache.take_moves():
            save = self._made(move, self.content)
            if save is not None:
                self.saves.append(save)

    def _made(self, move: Any, content: list[list[float]]) -> Save | None:
        """Makes a move; returns what it has read, where that is to be saved."""
        if isinstance(move, PageLoad):
            for page, data in zip(move.pages.tolist(), _slots(move.data), strict=True):
                content[page] = data
        elif isinstance(move, PageCopy):
            data = [list(content[page]) for page in move.sources.tolist()]
            for page, each in zip(move.targets.tolist(), data, strict=True):
                content[page] = each
        else:
            epoch, tokens = move.scope.weights_epoch, tuple(move.token_ids.tolist())
            data = [list(content[page]) for page in move.pages.tolist()]
            return Save(epoch, tokens, move.first_page, move.group, data)
        return None

    def _sees(self, row: int, tokens: int) -> bool:
        """Whether a row that is cut to ``tokens`` has all that the next token sees."""
        size, table = self.scope.page_size, self.cache.page_table
        for group, window in enumerate(self.scope.windows):
            first = 0 if window is None else max(0, tokens - window + 1) // size
            if tokens and not table.row_pages(row, group)[first : -(-tokens // size)].all():
                return False
        return True

    def _poison(self) -> None:
        """Poisons every slot that holds nothing, except those that a planned move is still to read."""
        size, table = self.scope.page_size, self.cache.page_table
        spared: set[int] = set()
        for move in self.cache._moves:
            if not isinstance(move, PageLoad):
                spared.update((move.sources if isinstance(move, PageCopy) else move.pages).tolist())
        is_cached, holders = self.cache.prefix._is_cached.tolist(), self.cache.allocator.pages._ref_count.tolist()
        written = [size if cached else 0 for cached in is_cached]
        for each in self.sequences:
            for pages in table.pages_by_group(each.row).tolist():
                for at, page in enumerate(pages):
                    written[page] = max(written[page], min(each.written - at * size, size))
        for page, slots in enumerate(self.content):
            if page not in spared:
                first = written[page] if holders[page] and page else 0
                slots[first:] = [POISON] * (size - first)

    # What holds in every state.

    def form(self) -> tuple[Any, ...]:
        return manager_form(self)

    def check(self) -> None:
        """Books that balance, and contents that are right once the planned moves are made."""
        cache, size = self.cache, self.scope.page_size
        cache.check_integrity()
        assert cache.page_table.rows_in_use().tolist() == sorted(each.row for each in self.sequences)
        if not self.sequences:
            assert not cache.held_tokens, "pages are held and nobody runs"
        self._check_evictable()
        content, saves = [list(each) for each in self.content], list(self.saves)
        for move in cache._moves:
            save = self._made(move, content)
            saves += [save] if save else []
        for save in saves:
            slots = _joined(save.data)
            assert slots == self._right(save.epoch, save.group, save.tokens)[-len(slots) :], "a save is wrong"
        for scope, tokens, pages, group in cache.prefix.runs():
            assert scope.weights_epoch == self.epoch, "what new weights have invalidated can be found"
            slots = _joined([content[page] for page in pages.tolist()])
            right = self._right(scope.weights_epoch, group, tuple(tokens.tolist()))
            assert slots == right[-len(slots) :], "cached pages hold other tokens"
        for segment in cache.host_tier.segments() if cache.host_tier else ():
            slots = _joined(_slots(segment.data))
            right = self._right(segment.scope.weights_epoch, segment.group, tuple(segment.token_ids.tolist()))
            assert slots == right[-len(slots) :], "pages on the host hold other tokens"
        for each in self.sequences:
            computed = cache.page_table.computed_len(each.row)
            for group, pages in enumerate(cache.page_table.pages_by_group(each.row).tolist()):
                first = next((at for at, page in enumerate(pages) if page), len(pages))
                slots = _joined([content[page] for page in pages])[first * size : each.written]
                right = self._right(each.epoch, group, each.tokens[: each.written])[first * size :]
                assert slots == right, "a row holds other tokens than its own"
                window = self.scope.windows[group]
                seen = 0 if window is None else max(0, computed - window + 1) // size
                assert first <= seen or computed == 0, "a page that the next token sees has left the row"
        table, told = cache.page_table, cache.page_table._told
        for each in self.sequences:
            known = table.pages_by_group(each.row)[:, : int(told[each.row])]
            there = self.device_table[each.row, :, : known.shape[1]]
            assert (there == known)[known > 0].all(), "the device has another page than the row"

    def _check_evictable(self) -> None:
        prefix, held = self.cache.prefix, set(self.cache.page_table.held_pages().tolist())
        nodes = [node for tree in prefix._forest.trees() for node in tree.nodes()]
        loose = {page for node in nodes if not node.locks for page in node.pages.tolist()}
        if None in self.scope.windows:
            assert not loose & held, "a row holds a page that counts as evictable"
        free = self.cache.allocator.pages.available
        cached = set(prefix.pages().tolist())
        assert prefix.evictable_pages == len(cached - held), "a page that nobody holds cannot be evicted"
        assert free + len(cached | held) == self.scope.pages, "a page is lost"

    def _right(self, epoch: int, group: int, tokens: tuple[int, ...]) -> list[float]:
        return [number_of(epoch, group, tokens[: end + 1]) for end in range(len(tokens))]


def _slots(data: Any) -> list[list[float]]:
    """Of each page of the pool's format its numbers; K and V must hold the same."""
    assert (data[:, :, :, 0] == data[:, :, :, 1]).all()
    return [list(page) for page in data[:, 0, :, 0, 0].tolist()]


def _joined(pages: list[list[float]]) -> list[float]:
    return [number for page in pages for number in page]
