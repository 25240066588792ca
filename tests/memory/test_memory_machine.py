"""Allocator and page table together, as a serving loop uses them: nothing is lost, shared by accident or overlapped."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from allocator_model import fingerprint
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import DoubleFreeError, KVPoolExhausted, ShapeError
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator
from engine.memory.rows import ReqToTokenPool


class MemoryMachine(RuleBasedStateMachine):
    """The model is what was written: a dict from each slot that holds a token to that token's position."""

    @initialize(
        page_size=st.one_of(st.sampled_from([1, 4, 16]), st.integers(1, 256)),
        num_pages=st.integers(2, 20),
        max_requests=st.integers(1, 5),
        context_pages=st.integers(1, 8),
    )
    def build(self, page_size, num_pages, max_requests, context_pages):
        self.page_size, self.max_requests = page_size, max_requests
        self.context = context_pages * page_size
        self.allocator = PagedTokenToKVPoolAllocator(num_pages * page_size, page_size)
        self.table = ReqToTokenPool(max_requests, self.context, page_size)
        self.lengths: dict[int, int] = {}
        self.position: dict[int, int] = {}
        self.cached: list[list[int]] = []

    @rule()
    def admit(self):
        if len(self.lengths) == self.max_requests:
            with pytest.raises(KVPoolExhausted):
                self.table.alloc_row()
            return
        row = self.table.alloc_row()
        assert row not in self.lengths
        self.lengths[row] = 0

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def extend(self, data):
        rows = data.draw(st.lists(st.sampled_from(sorted(self.lengths)), unique=True))
        self.grow(rows, [data.draw(st.integers(0, self.context - self.lengths[row])) for row in rows])

    @precondition(lambda self: self.lengths)
    @rule()
    def decode(self):
        rows = [row for row, length in self.lengths.items() if length < self.context]
        self.grow(rows, [1] * len(rows))

    def grow(self, rows, new):
        starts = np.array([self.lengths[row] for row in rows], np.int64)
        ends = starts + np.array(new, np.int64)
        last = self.table.last_loc(rows, starts)
        needed = int((-(-ends // self.page_size) - -(-starts // self.page_size)).sum()) * self.page_size
        if needed > self.allocator.available_size():
            before = fingerprint(self.allocator.backup_state())
            with pytest.raises(KVPoolExhausted) as caught:
                self.allocator.alloc_extend(starts, ends, last)
            assert (caught.value.requested, caught.value.available) == (needed, self.allocator.available_size())
            assert fingerprint(self.allocator.backup_state()) == before
            return
        slots = self.allocator.alloc_extend(starts, ends, last)
        self.table.write_slots(rows, starts, new, slots)
        positions = [at for start, end in zip(starts, ends, strict=True) for at in range(start, end)]
        assert not self.position.keys() & set(slots.tolist()), "a slot that holds a token was handed out"
        self.position.update(zip(slots.tolist(), positions, strict=True))
        self.lengths.update(zip(rows, ends.tolist(), strict=True))

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def finish(self, data):
        row = data.draw(st.sampled_from(sorted(self.lengths)))
        full = self.table.row_pages(row)[: self.lengths.pop(row) // self.page_size].tolist()
        kept = full[: data.draw(st.integers(0, len(full)))]
        self.allocator.pages.retain(kept)
        self.cached.append(kept)
        self.release(self.table.release(row).tolist())
        with pytest.raises(DoubleFreeError):
            self.table.release(row)

    @precondition(lambda self: self.cached and len(self.lengths) < self.max_requests)
    @rule(data=st.data())
    def hit(self, data):
        prefix = data.draw(st.sampled_from(self.cached))
        pages = prefix[: data.draw(st.integers(0, len(prefix)))]
        self.allocator.pages.retain(pages)
        row = self.table.alloc_row()
        self.table.append_pages(row, pages)
        self.lengths[row] = len(pages) * self.page_size

    @precondition(lambda self: self.cached)
    @rule()
    def evict(self):
        self.release(self.cached.pop(0))

    def release(self, pages):
        self.allocator.pages.release(pages)
        gone = {page for page in pages if not self.allocator.pages.ref_count([page])[0]}
        self.position = {slot: at for slot, at in self.position.items() if slot // self.page_size not in gone}

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def write_elsewhere(self, data):
        row = data.draw(st.sampled_from(sorted(self.lengths)))
        start = self.lengths[row]
        wrong_start = data.draw(st.integers(0, self.context).filter(lambda value: value != start))
        with pytest.raises(ShapeError):
            self.table.write_slots([row], [wrong_start], [1], [self.page_size + wrong_start % self.page_size])

    @invariant()
    def balanced(self):
        if not hasattr(self, "table"):
            return
        self.table.check_integrity()
        self.allocator.check_integrity([*self.table.held_pages().tolist(), *itertools.chain(*self.cached)])
        for row, length in self.lengths.items():
            slots = self.table.slots(row, 0, length).tolist()
            assert [self.position[slot] for slot in slots] == list(range(length))


MemoryMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMemoryMachine = MemoryMachine.TestCase
