"""The allocator against a dict: any sequence of calls, any page size; and every short sequence of a tiny pool."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from allocator_model import Model, fingerprint, pages_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import DoubleFreeError, EngineError, KVPoolExhausted
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences are lists of slots; extra holders are kept in the model only."""

    @initialize(num_pages=st.integers(1, 24), page_size=st.one_of(st.sampled_from([1, 2, 16]), st.integers(1, 256)))
    def build(self, num_pages, page_size):
        self.page_size = page_size
        self.allocator = PagedTokenToKVPoolAllocator(num_pages * page_size, page_size)
        self.model = Model(num_pages, page_size)
        self.sequences: list[np.ndarray] = []
        self.retained: list[int] = []
        self.saved = None

    def pages(self, sequence) -> list[int]:
        return sorted(pages_of(sequence, self.page_size))

    def needed(self, before: int, after: int) -> int:
        return -(-after // self.page_size) - -(-before // self.page_size)

    def refused(self, error, call) -> None:
        before = fingerprint(self.allocator.backup_state())
        with pytest.raises(error):
            call()
        assert fingerprint(self.allocator.backup_state()) == before

    @rule(count=st.integers(0, 26))
    def alloc(self, count):
        size = count * self.page_size
        if count > len(self.model.free_pages):
            self.refused(KVPoolExhausted, lambda: self.allocator.alloc(size))
            return
        slots = self.allocator.alloc(size)
        pages = pages_of(slots, self.page_size)
        assert slots.size == size == len(set(slots.tolist()))
        assert len(pages) == count
        self.model.take(pages)
        if count:
            self.sequences.append(slots)

    @rule(data=st.data())
    def extend(self, data):
        picks = data.draw(st.lists(st.integers(0, len(self.sequences) + 2), unique=True, max_size=5))
        grown = [self.sequences[i] if i < len(self.sequences) else np.array([], np.int32) for i in picks]
        new = [data.draw(st.integers(0, 3 * self.page_size)) for _ in picks]
        self.grow(picks, grown, new, decode=False)

    @rule(data=st.data())
    def decode(self, data):
        picks = data.draw(st.lists(st.integers(0, len(self.sequences) + 2), unique=True, max_size=5))
        grown = [self.sequences[i] if i < len(self.sequences) else np.array([], np.int32) for i in picks]
        self.grow(picks, grown, [1] * len(picks), decode=True)

    def grow(self, picks, grown, new, *, decode):
        prefix = [sequence.size for sequence in grown]
        ends = [size + count for size, count in zip(prefix, new, strict=True)]
        last = [int(sequence[-1]) if sequence.size else -1 for sequence in grown]
        call = (lambda: self.allocator.alloc_decode(ends, last)) if decode else (
            lambda: self.allocator.alloc_extend(prefix, ends, last))  # fmt: skip
        shared = any(size % self.page_size and count and self.model.holders[slot // self.page_size] > 1
                     for size, count, slot in zip(prefix, new, last, strict=True))  # fmt: skip
        needed = sum(self.needed(*pair) for pair in zip(prefix, ends, strict=True))
        if shared or needed > len(self.model.free_pages):
            self.refused(EngineError, call)
            return
        slots = call()
        fresh = pages_of(slots, self.page_size) - {
            page for sequence in grown for page in pages_of(sequence, self.page_size)
        }
        assert len(fresh) == needed
        self.model.take(fresh)
        for pick, sequence, part in zip(picks, grown, np.split(slots, np.cumsum(new)[:-1]) if new else [], strict=True):
            whole = np.concatenate([sequence, part])
            assert (whole % self.page_size == np.arange(whole.size) % self.page_size).all()
            assert len(pages_of(whole, self.page_size)) == -(-whole.size // self.page_size)
            if pick < len(self.sequences):
                self.sequences[pick] = whole
            elif whole.size:
                self.sequences.append(whole)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data):
        slots = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.allocator.free(data.draw(st.sampled_from([slots, slots[::-1], slots.tolist()])))
        for page in self.pages(slots):
            self.model.holders[page] -= 1

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def retain(self, data):
        pages = self.pages(data.draw(st.sampled_from(self.sequences)))
        self.allocator.pages.retain(pages)
        self.retained += pages
        for page in pages:
            self.model.holders[page] += 1

    @rule(data=st.data())
    def release(self, data):
        count = data.draw(st.integers(0, len(self.retained)))
        dropped, self.retained = self.retained[:count], self.retained[count:]
        self.allocator.pages.release(dropped)
        for page in dropped:
            self.model.holders[page] -= 1

    @rule(data=st.data())
    def free_what_is_not_held(self, data):
        free = sorted(self.model.free_pages)
        wrong = data.draw(st.sampled_from([0, -1, len(self.model.holders) + 1, *free]))
        held = [page for page, count in self.model.holders.items() if count]
        pages = data.draw(st.permutations([*held[:3], wrong]))
        self.refused(DoubleFreeError, lambda: self.allocator.free([page * self.page_size for page in pages]))
        self.refused(DoubleFreeError, lambda: self.allocator.pages.release(pages))

    @rule()
    def backup(self):
        self.saved = (
            self.allocator.backup_state(), dict(self.model.holders), list(self.sequences), list(self.retained)
        )  # fmt: skip

    @precondition(lambda self: self.saved is not None)
    @rule()
    def restore(self):
        state, holders, sequences, retained = self.saved
        self.allocator.restore_state(state)
        self.model.holders, self.sequences, self.retained = dict(holders), list(sequences), list(retained)

    @rule()
    def clear(self):
        self.allocator.clear()
        self.model.holders = dict.fromkeys(self.model.holders, 0)
        self.sequences, self.retained = [], []

    @invariant()
    def agree(self):
        if hasattr(self, "model"):
            self.model.agree(self.allocator)


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAllocatorMachine = AllocatorMachine.TestCase

OPERATIONS = ["alloc 1", "alloc 2", "extend", "decode", "free oldest", "free newest", "free again", "share", "undo"]


class Replay:
    """One sequence of calls on a pool of three pages of two tokens."""

    def __init__(self) -> None:
        self.allocator, self.model = PagedTokenToKVPoolAllocator(6, 2), Model(3, 2)
        self.live: list[np.ndarray] = []
        self.freed: list[tuple[np.ndarray, list[int]]] = []
        self.start = self.allocator.backup_state()

    def run(self, name: str) -> None:
        before = fingerprint(self.allocator.backup_state())
        action, _, argument = name.partition(" ")
        try:
            getattr(self, action)(*([argument] if argument else []))
        except EngineError:
            assert fingerprint(self.allocator.backup_state()) == before
        self.model.agree(self.allocator)

    def alloc(self, count: str) -> None:
        self.enter(self.allocator.alloc(2 * int(count)))

    def extend(self) -> None:
        self.enter(self.allocator.alloc_extend([0], [3], [-1]))

    def enter(self, slots: np.ndarray) -> None:
        self.model.take(pages_of(slots, 2))
        self.live.append(slots)

    def decode(self) -> None:
        tail = self.live[-1] if self.live else np.array([], np.int32)
        slots = self.allocator.alloc_decode([tail.size + 1], tail[-1:] if tail.size else [-1])
        self.model.take(pages_of(slots, 2) - pages_of(tail, 2))
        self.live[len(self.live) - 1 :] = [np.concatenate([tail, slots])]

    def share(self) -> None:
        if self.live:
            self.allocator.pages.retain(sorted(pages_of(self.live[0], 2)))
            for page in pages_of(self.live[0], 2):
                self.model.holders[page] += 1
            self.live.append(self.live[0])

    def undo(self) -> None:
        self.allocator.restore_state(self.start)
        self.model.holders = dict.fromkeys(self.model.holders, 0)
        self.freed += [(slots, self.generations(slots)) for slots in self.live]
        self.live.clear()

    def free(self, which: str) -> None:
        if which == "again":
            self.free_again()
        elif self.live:
            slots = self.live.pop(0 if which == "oldest" else -1)
            self.freed.append((slots, self.generations(slots)))
            self.allocator.free(slots)
            self.model.drop(pages_of(slots, 2))

    def free_again(self) -> None:
        """Refused if a page is free or was handed out again; else it is the free of another holder's share."""
        if not self.freed:
            return
        slots, generations = self.freed[-1]
        if all(self.model.holders[page] for page in pages_of(slots, 2)):
            if self.allocator.pages.handouts.find(slots) is None:
                return  # a concatenation: the allocator cannot tell a stale one from a live one
            if generations == self.generations(slots):
                self.allocator.free(slots)
                self.model.drop(pages_of(slots, 2))
                return
        with pytest.raises(DoubleFreeError):
            self.allocator.free(slots)

    def generations(self, slots: np.ndarray) -> list[int]:
        return [self.model.times_taken[page] for page in sorted(pages_of(slots, 2))]


@pytest.mark.parametrize("depth", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_every_short_sequence_of_calls_on_three_pages_is_right(depth):
    for names in itertools.product(OPERATIONS, repeat=depth):
        replay = Replay()
        for name in names:
            replay.run(name)
