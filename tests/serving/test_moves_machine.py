"""Scheduling over a device that is made of NumPy arrays: page moves, forks and waits under random traffic and faults.

The device keeps a number for each prefix, and the slot of a prefix's last token contains it. A step reads what the
slots of its sequences contain and chooses the next token by that alone. So a wrong page, or a right one at a wrong
time, shows as a chain of numbers that does not join up, or as a wrong answer.

Layers form up to three groups, and each slot contains its group too. A group with a window is read through the window
alone: what lies behind it may contain anything.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
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
from scheduler_support import CONTEXT, PAGE, Clock

from engine.errors import RequestTooLarge
from engine.layer_groups import first_kept_page
from engine.memory.manager import CacheManager
from engine.memory.offload.host_tier import HostTier
from engine.memory.offload.page_format import PageFormat
from engine.memory.scope import CacheScope, LayoutKey
from engine.serving.device.batcher import Batcher, parcel_shapes
from engine.serving.device.page_mover import PageMover
from engine.serving.device.parcel import LAST_SAMPLED, NOWHERE, StepParcel
from engine.serving.groups import AnswerGroups, group_of
from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.replica import Replica
from engine.serving.plan.scheduler import Scheduler
from engine.serving.recovery import Recovery
from engine.serving.request import FinishReason, Request
from engine.serving.sampling_params import SamplingParams
from engine.serving.stepper import Stepper
from engine.serving.watch.stats import EngineStats

WINDOWS = [(None,), (None,), (None, 8), (None, 5, 5), (9,), (4, 11), (None, None, 6)]
SLOTS, VOCAB, STOP, PATIENCE = 4, 5, 3, 2_000
TRUNK = np.arange(40) % 7 + 10


class Boom(Exception):
    """What an injected fault raises."""


class Numbers:
    """A number for each prefix, and the token that follows it."""

    def __init__(self):
        self.of: dict[tuple[int, int], int] = {}
        self.before: list[int] = []

    def after(self, before, token):
        number = self.of.setdefault((before, token), len(self.before))
        if number == len(self.before):
            self.before.append(before)
        return number

    def next_token(self, number):
        return (number * 2_654_435_761 >> 7) % VOCAB

    def chain(self, number, length):
        """The numbers of a prefix's own prefixes, the shortest first."""
        found = []
        while len(found) < length:
            found.append(number)
            number = self.before[number]
        return found[::-1]


class PretendRunner:
    """Runs every program when it is dispatched, which is in the order in which a device would."""

    def __init__(self, caches, numbers, page_shape):
        self.caches, self.numbers, self.root = caches, numbers, -1
        table = caches[0].page_table
        self.windows, self.page_size = table.windows, table.page_size
        self.content = np.full((len(caches), caches[0].size // self.page_size + 1, *page_shape), -7, np.float32)
        self.table = np.zeros((len(caches), table.max_requests, table.num_groups, table.max_pages), np.int32)
        self.last = np.zeros((len(caches), table.max_requests), np.int32)
        self.fails_at = None

    def fail(self, name):
        if self.fails_at == name:
            raise Boom

    def enter_rows(self, chunks):
        assert not chunks  # no request here adjusts its logits

    def start_reading(self, pages, *, replica=0):
        self.fail("read")
        data = self.content[replica][pages]
        return SimpleNamespace(wait=lambda: data)

    def write(self, pages, data, *, replica=0):
        self.fail("write")
        self.content[replica][pages] = data

    def copy(self, sources, targets, *, replica=0):
        self.fail("copy")
        self.content[replica][targets] = self.content[replica][sources]

    def step(self, parcel, shape, earlier, adjusts):
        assert adjusts is None
        replicas = len(self.caches)
        packed = parcel.packed.reshape(replicas, -1)
        for updates in earlier:
            for replica, (places, pages) in enumerate(updates.reshape(replicas, 2, -1)):
                self.update(replica, places, pages)
        self.fail("step")
        tokens = [self.run(index, StepParcel.over(part, shape)) for index, part in enumerate(packed)]
        self.fail("late step")
        return SimpleNamespace(tokens=np.concatenate(tokens), sampled=None, logits=None)

    def update(self, replica, places, pages):
        real = places != NOWHERE
        self.table[replica].reshape(-1)[places[real]] = pages[real]

    def run(self, replica, parcel):
        self.update(replica, parcel.update_at, parcel.update_page)
        chosen = np.zeros(parcel.kv_lens.size, np.int32)
        rows = parcel.req_pool_idx[parcel.req_pool_idx != NOWHERE].tolist()
        assert len(set(rows)) == len(rows)
        slots, written = self.content[replica], []
        for index, row in enumerate(rows):
            first, stop = parcel.cu_q_lens[index : index + 2].tolist()
            end, fed = int(parcel.kv_lens[index]), parcel.token_ids[first:stop].tolist()
            number = self.read(replica, row, end - len(fed))
            for position, token in enumerate(fed, end - len(fed)):
                number = self.numbers.after(number, self.last[replica, row] if token == LAST_SAMPLED else token)
                column, offset = divmod(position, self.page_size)
                pages = self.table[replica, row, :, column].tolist()
                written += [(page, offset, number, group) for group, page in enumerate(pages)]
            chosen[index] = self.last[replica, row] = self.numbers.next_token(number)
        assert len({(page, offset) for page, offset, _, _ in written}) == len(written), "two rows write one slot"
        for page, offset, number, group in written:
            assert page, "the null page is written"
            slots[page, 0, offset, :, 0] = number, group
        return chosen

    def read(self, replica, row, start):
        """The number of a row's first ``start`` tokens, after a look at all that the next token sees of them."""
        number, slots = self.root, self.content[replica].reshape(-1, 2).astype(int)
        for group, window in enumerate(self.windows):
            seen = np.arange(0 if window is None else max(start - window + 1, 0), start)
            pages = self.table[replica, row, group, seen // self.page_size]
            found = slots[pages * self.page_size + seen % self.page_size]
            number = found[-1, 0] if seen.size else number
            expected = self.numbers.chain(number, start)[start - seen.size :]
            assert found[:, 0].tolist() == expected, "a step reads what is not its sequence"
            assert (found[:, 1] == group).all(), "a step reads what is of another group"
        return number

    def recover(self):
        return True


class MovesMachine(RuleBasedStateMachine):
    @initialize(
        replicas=st.integers(1, 2),
        pages=st.integers(10, 24),
        host_pages=st.sampled_from([0, 5, 60, 60]),
        policy=st.sampled_from(["lru", "lru", "lfu", "priority", None]),
        budget=st.sampled_from([4, 9, 40]),
        overlap=st.booleans(),
        windows=st.sampled_from(WINDOWS),
        page_size=st.sampled_from([PAGE, PAGE, 2, 1]),
    )
    def build(self, replicas, pages, host_pages, policy, budget, overlap, windows, page_size):
        self.numbers, self.page_size = Numbers(), page_size
        layout = {"page_size": page_size, "head_num": 1, "head_dim": 1, "dtype": "float32", "version": 1}
        form = PageFormat(1, np.dtype(np.float32), layout, windows)
        size = pages * PAGE * (1 + sum(window is None for window in windows))
        options = {"policy": policy, "windows": windows, "ahead_tokens": (1 + overlap) * max(budget, SLOTS)}
        self.caches = [CacheManager(size, page_size, SLOTS, CONTEXT, **options) for _ in range(replicas)]
        self.tier = HostTier(host_pages * PAGE // page_size * form.page_bytes, form) if host_pages else None
        for cache in self.caches if self.tier else ():
            cache.attach_host_tier(self.tier)
        queue = RequestQueue()
        options = {"max_running_requests": SLOTS, "max_step_tokens": budget}
        members = [Replica(cache, queue, index=index, **options) for index, cache in enumerate(self.caches)]
        self.scheduler = Scheduler(members, queue, Clock())
        self.runner = PretendRunner(self.caches, self.numbers, form.page_shape)
        self.mover = PageMover(self.runner, self.tier)
        batcher = Batcher(parcel_shapes(SLOTS, members[0].max_step_tokens, page_size, len(windows)), replicas)
        stats = EngineStats()
        self.stepper = Stepper(self.scheduler, batcher, self.runner, self.mover, stats, overlap=overlap)
        self.groups = AnswerGroups()
        self.recovery = Recovery(self.scheduler, self.stepper, self.runner, self.groups, stats)
        self.epoch = self.made = self.faults = 0

    @rule(
        trunk=st.sampled_from([0, 8, 11, 23]),
        tail=st.integers(0, 6),
        branch=st.integers(0, 2),
        together=st.integers(1, 3),
        new=st.integers(1, 9),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.integers(-1, 1),
        salt=st.sampled_from(["", "", "", "other"]),
        stops=st.booleans(),
    )
    def add(self, trunk, tail, branch, together, new, n, priority, salt, stops):
        """Requests that begin alike, as many as come ``together``."""
        params = SamplingParams(max_new_tokens=new, n=n, priority=priority)
        for number in range(together):
            own = np.arange(tail + number) + 100 * branch + 100
            prompt = np.concatenate([TRUNK[:trunk], own, [99] * (not trunk and not own.size)]).astype(np.int32)
            leader, *siblings = (self.make_request(prompt, params, salt, stops) for _ in range(n))
            leader.siblings = siblings
            try:
                self.scheduler.check_fits(leader)
            except RequestTooLarge:
                continue
            self.groups.add(leader)
            self.scheduler.add(leader)

    def make_request(self, prompt, params, salt, stops):
        self.made += 1
        return Request(self.made, prompt, params, frozenset([STOP] if stops else []), self.scope(salt))

    @rule(steps=st.integers(1, 8))
    def step(self, steps):
        for _ in range(steps):
            self.advance()

    @rule(where=st.sampled_from(["read", "write", "copy", "step", "late step"]), steps=st.integers(1, 20))
    def fail(self, where, steps):
        self.runner.fails_at = where
        try:
            for _ in range(steps):
                self.advance()
        except Boom as error:
            self.faults += 1
            self.runner.fails_at = None
            self.recovery.after(error)
        self.runner.fails_at = None

    @precondition(lambda self: self.groups.unfinished)
    @rule(data=st.data())
    def abort(self, data):
        leader = self.groups.unfinished[data.draw(st.sampled_from(sorted(self.groups.unfinished)))]
        for request in group_of(leader):
            self.scheduler.end(request, FinishReason.ABORT)
        self.groups.forget(leader)
        if not self.scheduler.has_work:
            self.stepper.finish()

    @rule()
    def reset(self):
        self.stepper.forget_saves()
        for cache in self.caches:
            cache.reset_prefix_cache()
        assert not any(cache.cached_tokens(self.scope(), TRUNK.astype(np.int32)) for cache in self.caches)

    @precondition(lambda self: not self.groups.unfinished)
    @rule()
    def replace_weights(self):
        self.epoch += 1
        for cache in self.caches:
            cache.prefix.raise_weights_epoch("model", self.epoch)
        self.runner.root -= 1

    def advance(self):
        """A step as ``LLM`` makes it."""
        ended = self.groups.ended
        self.start_siblings()
        if self.scheduler.has_work:
            self.stepper.advance(ended)
            self.start_siblings()
        else:
            self.stepper.finish()
        assert not self.scheduler.queue.faults
        for leader in self.groups.complete():
            self.check_answers(leader)
            self.groups.forget(leader)
        ended.clear()

    def start_siblings(self):
        for leader, sibling in self.groups.to_start():
            self.scheduler.queue.acting_for = sibling
            self.scheduler.fork(leader, sibling)
            self.scheduler.queue.acting_for = None

    def check_answers(self, leader):
        for request in group_of(leader):
            if request.finish_reason is FinishReason.ERROR:
                assert self.faults
                continue
            number, expected = self.runner.root, []
            for token in leader.prompt.tolist():
                number = self.numbers.after(number, token)
            while len(expected) < leader.params.max_new_tokens and leader.stop_ids.isdisjoint(expected[-1:]):
                expected.append(self.numbers.next_token(number))
                number = self.numbers.after(number, expected[-1])
            assert request.output == expected
            assert 0 <= request.cached_tokens < len(request.prompt)

    def scope(self, salt=""):
        return CacheScope("model", self.epoch, None, salt, LayoutKey.of({"version": 1}))

    @invariant()
    def books_balance(self):
        if not hasattr(self, "caches"):
            return
        self.scheduler.check_integrity()
        for cache in self.caches:
            table, nodes = cache.page_table, [node for tree in cache.prefix._forest.trees() for node in tree.nodes()]
            unlocked = np.concatenate([np.zeros(0, np.int32), *(node.pages for node in nodes if not node.locks)])
            for group, window in enumerate(cache.prefix.windows):
                if window is None:
                    pages = unlocked if cache.prefix._groups is None else cache.prefix._groups.of(unlocked)[group]
                    assert not np.isin(pages, table.held_pages()).any()
                    continue
                for row in table.rows_in_use().tolist():
                    kept = first_kept_page(window, table.computed_len(row), self.page_size)
                    # What is being loaded counts as computed when a step has run.
                    assert self.tier or table.row_pages(row, group)[kept:].all(), "a page within the window has gone"
                    assert not table.row_pages(row, group)[:kept].any(), "a page behind the window is held"
            assert cache.prefix.hit_tokens <= cache.prefix.query_tokens
        if not self.scheduler.has_work:
            assert self.scheduler.held_tokens == 0

    @invariant()
    def only_right_contents_are_cached(self):
        if not hasattr(self, "caches"):
            return
        for index, cache in enumerate(self.caches):
            for scope, tokens, pages, group in cache.prefix.runs():
                self.check_content(scope, tokens, self.runner.content[index][pages], group)
        for segment in self.tier.segments() if self.tier else ():
            self.check_content(segment.scope, segment.token_ids, segment.data, segment.group)

    def check_content(self, scope, tokens, content, group):
        number = -1 - scope.weights_epoch
        for token in tokens.tolist():
            number = self.numbers.after(number, token)
        found, groups = content.reshape(-1, 2).astype(int).T.tolist()
        assert found == self.numbers.chain(number, tokens.size)[-len(found) :]
        assert set(groups) <= {group}

    def teardown(self):
        for _ in range(PATIENCE):
            if not hasattr(self, "caches") or not self.groups.unfinished:
                return
            self.advance()
        raise AssertionError("requests do not get on")


@pytest.mark.parametrize("examples", [60, pytest.param(2_000, marks=pytest.mark.slow)])
def test_whatever_comes_every_step_reads_its_own_sequence_and_every_answer_is_right(examples):
    options = {"max_examples": examples, "stateful_step_count": 30, "deadline": None}
    chosen = settings(**options, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(MovesMachine, settings=chosen)
