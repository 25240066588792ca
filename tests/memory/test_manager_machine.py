"""The cache manager over a pool of pages that really move: every step reads right contents, whatever came before.

A step is dispatched before the one before it is committed. The device runs programs in the order of dispatch, so this
one makes them at once: a page that was freed or rewritten too early is seen by the step that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from cache_mirror import CacheMirror
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_memory_faults import with_fault

from engine.errors import KVPoolExhausted, RequestTooLarge, ShapeError
from engine.memory.manager import CacheManager
from engine.memory.offload.host_tier import HostTier
from engine.memory.offload.page_format import PageFormat
from engine.memory.page_moves import PageCopy, PageLoad
from engine.memory.scope import CacheScope, LayoutKey

PAGE, CONTEXT, ROWS = 4, 40, 5
DESCRIPTOR = {"page_size": PAGE, "head_num": 1, "head_dim": 1, "dtype": "float32", "version": 1}
MOST_GROUPS = 3
LAYOUT = LayoutKey.of({"version": 1})
TRUNK = tuple(range(CONTEXT))


@dataclass(eq=False)
class Sequence:
    """A running request: its row, and the tokens that it knows."""

    row: int
    scope: CacheScope
    tokens: tuple[int, ...]
    is_forgotten: bool = False  # whether the cache was reset since it came
    flights: list[list[int]] = field(default_factory=list)  # the end of each step under way, one entry each


class ManagerMachine(RuleBasedStateMachine):
    windows = (None,)

    @initialize(
        pages=st.integers(8, 24),
        host_pages=st.sampled_from([0, 6, 40]),
        policy=st.sampled_from(["lru", "lru", "lfu", "priority", None]),
        ahead=st.sampled_from([None, 2 * CONTEXT, 12]),
    )
    def build(self, pages, host_pages, policy, ahead):
        windows = self.windows
        pages *= len(windows)
        told = {"ahead_tokens": ahead, "max_events": 0 if windows[0] else 30}
        self.cache = CacheManager(pages * PAGE, PAGE, ROWS, CONTEXT, policy=policy, windows=windows, **told)
        self.mirror = CacheMirror(self.cache.prefix)
        page_format = PageFormat(1, np.dtype(np.float32), DESCRIPTOR, windows)
        if host_pages:
            self.cache.attach_host_tier(HostTier(host_pages * page_format.page_bytes, page_format))
        self.content = np.full((pages + 1, *page_format.page_shape), -1, np.float32)
        self.device_table = np.zeros((ROWS, len(windows), CONTEXT // PAGE), np.int32)
        self.numbers: dict[tuple, int] = {}  # of each prefix: what its last token's slot contains
        self.sequences: list[Sequence] = []
        self.flights: list[list[tuple[Sequence, list[int]]]] = []
        self.saves: list[tuple] = []  # read, and not in the host tier yet
        self.epoch = 0

    # What a request does.

    @rule(
        trunk=st.sampled_from([0, 8, 11, 20]),
        tail=st.sampled_from([0, 1, 6, 10]),
        branch=st.integers(0, 1),
        salt=st.sampled_from(["", "", "", "other"]),
        most=st.integers(0, 12),
        priority=st.integers(0, 2),
        at=st.none() | st.integers(1, 150),
    )
    def admit(self, trunk, tail, branch, salt, most, priority, at):
        scope = CacheScope("model", self.epoch, None, salt, LAYOUT)
        tokens = TRUNK[:trunk] + tuple(100 * branch + i + 1000 for i in range(tail)) or (7,)
        options = {"most_tokens": min(len(tokens) + most, CONTEXT), "priority": priority}
        try:
            admission = self.called(at, self.cache.admit, scope, vector(tokens), **options)
        except RequestTooLarge:
            return
        if admission is None:
            return
        sequence = self.enter(admission.row, scope, tokens)
        assert self.cache.page_table.kv_len(sequence.row) == admission.cached_tokens + admission.loaded_tokens
        assert self.cache.page_table.computed_len(sequence.row) == admission.cached_tokens

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), at=st.none() | st.integers(1, 100))
    def fork(self, data, at):
        parent = self.pick(data)
        computed = self.cache.page_table.computed_len(parent.row)
        tokens = data.draw(st.sampled_from([computed, max(computed - 1, 0)]) | st.integers(0, computed))
        if not self.cache.can_fork(parent.row, tokens):
            return
        row = self.called(at, self.cache.fork, parent.row, tokens)
        if row is not None:
            self.enter(row, parent.scope, parent.tokens[:tokens]).is_forgotten = parent.is_forgotten

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), at=st.none() | st.integers(1, 60))
    def share(self, data, at):
        sequence = self.pick(data)
        table, row = self.cache.page_table, sequence.row
        before = table.kv_len(row)
        if table.computed_len(row) < before or sequence.flights:
            return
        shared = self.called(at, self.cache.share, row, sequence.scope, vector(sequence.tokens))
        assert shared is None or table.kv_len(row) == table.computed_len(row) == before + shared

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), at=st.none() | st.integers(1, 60))
    def truncate(self, data, at):
        sequence = self.pick(data)
        length = self.cache.page_table.kv_len(sequence.row)
        tokens = data.draw(st.integers(0, length))
        if not self.holds_what_is_seen(sequence.row, tokens):
            with pytest.raises(ShapeError, match="left with the window"):
                self.cache.truncate(sequence.row, tokens)
            return
        try:
            self.called(at, self.cache.truncate, sequence.row, tokens)
        except KVPoolExhausted:
            return
        after = self.cache.page_table.kv_len(sequence.row)
        if after != tokens:
            assert after == length  # a fault came first
            return
        for flight in sequence.flights:  # what a step under way computes beyond is rejected
            flight[0] = min(flight[0], tokens)
        if data.draw(st.booleans(), label="goes on otherwise"):
            sequence.tokens = sequence.tokens[:tokens]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), more=st.integers(0, 6), at=st.none() | st.integers(1, 120))
    def publish(self, data, more, at):
        sequence = self.pick(data)
        cached = self.cache.prefix.cached_pages
        self.called(at, self.cache.publish, sequence.row, sequence.scope, vector(sequence.tokens + (9,) * more))
        assert not sequence.is_forgotten or self.cache.prefix.cached_pages == cached

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), kept=st.sampled_from(["all", "none", "more"]), at=st.none() | st.integers(1, 150))
    def release(self, data, kept, at):
        sequence = self.pick(data)
        tokens = {"all": sequence.tokens, "none": (), "more": (*sequence.tokens, 9, 9, 9, 9)}[kept]
        self.sequences.remove(sequence)
        before, cached = self.cache.page_table.rows_in_use().size, self.cache.prefix.cached_pages
        self.called(at, self.cache.release, sequence.row, sequence.scope, vector(tokens))
        if self.cache.page_table.rows_in_use().size == before:  # a fault came before it began
            self.sequences.append(sequence)
        assert not sequence.is_forgotten or self.cache.prefix.cached_pages == cached

    # Steps, and what lies between them.

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), commits=st.booleans(), publishes=st.booleans(), at=st.none() | st.integers(1, 60))
    def step(self, data, commits, publishes, at):
        some = st.lists(st.sampled_from(self.sequences), min_size=1, unique=True)
        chosen = data.draw(st.just(list(self.sequences)) | some, label="chosen")
        table, counts = self.cache.page_table, []
        for sequence in chosen:
            length = table.kv_len(sequence.row)
            known = max(len(sequence.tokens) - length, 1)
            count = min(data.draw(st.sampled_from([known, known, 1, 4]), label="count"), CONTEXT - length)
            branch = data.draw(st.integers(0, 1), label="branch")
            new = length + count - len(sequence.tokens)
            sequence.tokens += tuple(2000 + 100 * branch + i for i in range(new))
            counts.append(count)
        rows = np.array([each.row for each in chosen], np.int32)
        if not self.cache.has_room_to_grow(rows, np.array(counts)):
            with pytest.raises(KVPoolExhausted):
                self.cache.grow(rows, np.array(counts))
            return
        starts = table.kv_lens(rows).tolist()
        if self.called(at, self.cache.grow, rows, np.array(counts), done=True):
            self.dispatch(chosen, rows, starts, counts, commits, publishes)
        elif table.kv_lens(rows).tolist() != starts:
            for row, start in zip(rows.tolist(), starts, strict=True):
                self.cache.truncate(row, start)

    def dispatch(self, chosen, rows, starts, counts, commits, publishes):
        table = self.cache.page_table
        self.make_moves()
        places, pages = table.take_new_pages(rows)
        self.device_table.reshape(-1)[places] = pages
        flight = []
        for sequence, start, count in zip(chosen, starts, counts, strict=True):
            for group, window in enumerate(self.windows):
                held = table.row_pages(sequence.row, group)
                first = 0 if window is None else max(0, start - window + 1)
                seen = slice(first // PAGE, held.size)
                np.testing.assert_array_equal(self.device_table[sequence.row, group, seen], held[seen])
                assert held[seen].all(), "a page that the step sees has left the row"
                slots = self.content[held].reshape(-1, 2)
                right = self.right(sequence.scope, sequence.tokens[: start + count], group)
                np.testing.assert_array_equal(slots[first:start, 0], right[first:start])
                for position in range(start, start + count):
                    page = held[position // PAGE]
                    assert self.cache.allocator.pages.ref_count([page])[0] == 1, "a shared page is written"
                    self.content[page, 0, position % PAGE] = right[position]
            sequence.flights.append([start + count])
            flight.append((sequence, sequence.flights[-1]))
        self.flights.append(flight)
        if len(self.flights) > 2:
            self.commit(publishes=True)
        elif commits:
            self.commit(publishes=publishes)

    @precondition(lambda self: self.flights)
    @rule(publishes=st.booleans(), leaves=st.booleans())
    def commit(self, publishes, leaves=True):
        self.land()
        for sequence, end in self.flights.pop(0):
            sequence.flights.remove(end)
            if sequence in self.sequences:
                self.cache.mark_computed([sequence.row], end)
                if publishes:
                    self.cache.publish(sequence.row, sequence.scope, vector(sequence.tokens))
                if leaves:
                    self.leave_behind(sequence.row)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), at=st.none() | st.integers(1, 40))
    def pass_windows(self, data, at):
        self.leave_behind(self.pick(data).row, at)

    def leave_behind(self, row, at=None):
        """After it the row holds in each group just what a step that begins at the first uncomputed token can see."""
        table = self.cache.page_table
        before = table.pages_by_group(row)
        self.called(at, self.cache.leave_behind, [row])
        if at is not None and (table.pages_by_group(row) == before).all():
            return  # a fault came first
        for group, window in enumerate(self.windows):
            held = table.row_pages(row, group)
            first = 0 if window is None else max(0, table.computed_len(row) - window + 1) // PAGE
            assert held[first:].all()
            left = before[group, : np.flatnonzero(before[group])[0]].size if before[group].any() else 0
            assert not held[: max(first, left)].any(), "a page that no step sees stays in the row"

    def holds_what_is_seen(self, row, tokens):
        """Whether a row that is cut to ``tokens`` has all that the next token sees."""
        for group, window in enumerate(self.windows):
            first = 0 if window is None else max(0, tokens - window + 1) // PAGE
            if tokens and not self.cache.page_table.row_pages(row, group)[first : -(-tokens // PAGE)].all():
                return False
        return True

    def make_moves(self):
        for move in self.cache.take_moves():
            if isinstance(move, PageLoad):
                self.content[move.pages] = move.data
            elif isinstance(move, PageCopy):
                self.content[move.targets] = self.content[move.sources]
            else:
                self.saves.append((move, self.content[move.pages]))

    def land(self):
        for move, data in self.saves:
            self.cache.host_tier.put(move.scope, move.token_ids, move.first_page, data, move.group)
        self.saves = []

    @rule(pages=st.sampled_from([1, 3, 30]))
    def evict(self, pages):
        self.cache.prefix.evict(pages)
        self.make_moves()  # as for a step of nobody
        self.land()

    @rule(at=st.none() | st.integers(1, 60))
    def reset(self, at):
        self.saves = []
        for sequence in self.sequences:
            sequence.is_forgotten = True
        scopes = [CacheScope("model", self.epoch, None, salt, LAYOUT) for salt in ("", "other")]

        def is_found():
            return any(self.cache.cached_tokens(scope, vector(TRUNK)) for scope in scopes)

        self.called(at, self.cache.reset_prefix_cache)
        if at is not None and (is_found() or (self.cache.host_tier and self.cache.host_tier.held_pages)):
            self.cache.reset_prefix_cache()  # the fault came before the first change
        assert not is_found()
        assert not self.cache.host_tier or not self.cache.host_tier.held_pages

    @rule()
    def replace_weights(self):
        self.epoch += 1
        self.cache.prefix.raise_weights_epoch("model", self.epoch)

    @rule(clears=st.booleans())
    def start_anew(self, clears):
        """As after a fault: steps under way and moves are dropped, and what was computed stays cached."""
        for sequence in self.sequences:
            self.cache.release(sequence.row, sequence.scope, vector((*sequence.tokens, 9, 9, 9, 9)))
        self.cache.check_integrity()
        assert not self.cache.held_tokens
        if clears:
            self.cache.clear()
        self.cache.take_moves()
        self.sequences, self.flights, self.saves = [], [], []

    # What holds at any time.

    @invariant()
    def books_balance(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        rows = sorted(each.row for each in self.sequences)
        assert self.cache.page_table.rows_in_use().tolist() == rows  # none appears or is left behind after a fault
        prefix, table = self.cache.prefix, self.cache.page_table
        nodes = [node for tree in prefix._forest.trees() for node in tree.nodes()]
        loose = [page for node in nodes if not node.locks for page in node.pages.tolist()]
        full, held = self.windows.count(None), table.held_pages()
        assert not full or not set(loose) & set(held.tolist()), "a row holds a page that counts as evictable"
        cached = prefix.pages()
        assert prefix.evictable_pages <= cached.size - np.isin(cached, held).sum()
        assert len(self.windows) > full or prefix.evictable_pages == len(loose) * full
        for sequence in self.sequences:
            locked = self.cache.locked_pages(sequence.row)
            mine = table.pages_by_group(sequence.row)
            assert locked <= table.kv_len(sequence.row) // PAGE * len(self.windows), "a row locks more than it holds"
            assert len(self.windows) > full or prefix.is_cached(mine[:, : locked // full].reshape(-1)).all()
        assert prefix.hit_tokens <= prefix.query_tokens

    @invariant()
    def who_follows_the_events_knows_all_that_is_found(self):
        if hasattr(self, "cache") and self.windows[0] is None:
            self.mirror.follow()
            assert self.mirror.prefixes == self.mirror.found()

    @invariant()
    def only_right_contents_are_cached(self):
        if not hasattr(self, "cache"):
            return
        for scope, tokens, pages, group in self.cache.prefix.runs():
            slots = self.content[pages].reshape(-1, 2)[:, 0]
            np.testing.assert_array_equal(slots, self.right(scope, tokens.tolist(), group)[-slots.size :])
        for segment in self.cache.host_tier.segments() if self.cache.host_tier else ():
            slots = segment.data.reshape(-1, 2)[:, 0]
            right = self.right(segment.scope, segment.token_ids.tolist(), segment.group)
            np.testing.assert_array_equal(slots, right[-slots.size :])

    # Help.

    def enter(self, row, scope, tokens):
        self.sequences.append(Sequence(row, scope, tokens))
        return self.sequences[-1]

    def pick(self, data):
        return data.draw(st.sampled_from(self.sequences), label="sequence")

    def right(self, scope, tokens, group):
        """What the slots of a sequence contain in a group: a number for each prefix."""
        found, key = [], (scope,)
        for token in tokens:
            key = self.numbers.setdefault((key, int(token)), len(self.numbers))
            found.append(key)
        return np.array(found, np.float32) * MOST_GROUPS + group

    def called(self, at, function, *arguments, done=None, **options):
        """The result of a call, ``done`` in place of None; None where it has raised at its ``at``-th line instead."""
        if at is None:
            result = function(*arguments, **options)
        else:
            results = []
            if isinstance(with_fault(lambda: results.append(function(*arguments, **options)), at), str):
                return None
            result = results[0]
        return done if result is None else result


class WithoutFaults(ManagerMachine):
    def called(self, at, function, *arguments, done=None, **options):
        return super().called(None, function, *arguments, done=done, **options)


def vector(tokens):
    return np.array(tokens, np.int32)


def play(windows, examples, *, faults):
    machine = type("Machine", (ManagerMachine if faults else WithoutFaults,), {"windows": windows})
    options = {"stateful_step_count": 40, "deadline": None, "suppress_health_check": list(HealthCheck)}
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, **options))


@pytest.mark.parametrize(("windows", "examples"), [((None,), 40), ((None, 8), 15), ((None, 4, 13), 10), ((9,), 10)])
@pytest.mark.parametrize("faults", [False, True])
def test_whatever_is_called_in_any_order_every_step_reads_right_contents(faults, windows, examples):
    play(windows, examples, faults=faults)


@pytest.mark.slow
@pytest.mark.parametrize("windows", [(None,), (None, 8), (None, 5, 5), (None, 4, 13), (None, None, 6), (9,), (4, 11)])
@pytest.mark.parametrize("faults", [False, True])
def test_the_same_for_long(faults, windows):
    play(windows, 200, faults=faults)
