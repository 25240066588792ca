"""What is evicted first, under each policy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import IntegrityError
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator
from engine.memory.prefix.cache import RadixCache
from engine.memory.prefix.eviction import Evictable, EvictionOrder, UseList
from engine.memory.scope import CacheScope, LayoutKey

PAGE = 4
LAYOUT = LayoutKey.of({"page_size": PAGE})


class Bench:
    """A cache, and the names of its sequences in the order in which their pages are evicted."""

    def __init__(self, policy="lru", pages=64):
        self.allocator = PagedTokenToKVPoolAllocator(pages * PAGE, PAGE)
        self.cache = RadixCache(self.allocator, PAGE, policy=policy, on_evict=self.note)
        self.evicted = []

    def note(self, runs):
        # A sequence is named by its last page's first token; pages of a run leave from the end.
        for run in runs:
            self.evicted += run.token_ids[::-PAGE][: len(run.pages)].tolist()

    def scope(self, model="m", epoch=0):
        return CacheScope(model, epoch, None, "", LAYOUT)

    def tokens(self, *names):
        return np.repeat(np.array(names, np.int32), PAGE)

    def insert(self, *names, scope=None, priority=0):
        known = self.cache.match(scope or self.scope(), np.append(self.tokens(*names), 0)).pages
        self.allocator.pages.retain(known)
        need = (len(names) - len(known)) * PAGE
        fresh = self.allocator.alloc(need)[::PAGE] // PAGE
        pages = np.concatenate([known, fresh])
        self.cache.insert(scope or self.scope(), self.tokens(*names), pages, priority=priority)
        self.allocator.pages.release(pages)

    def match(self, *names, scope=None):
        return self.cache.match(scope or self.scope(), np.append(self.tokens(*names), 0))

    def hit(self, *names, times=1):
        for _ in range(times):
            self.cache.record(self.match(*names))

    def evict_all(self):
        while self.cache.evict(1):
            self.cache.check_integrity()
        return self.evicted


def test_lru_evicts_what_was_not_used_for_longest():
    bench = Bench()
    for name in (1, 2, 3, 4):
        bench.insert(name)
    bench.hit(2)
    bench.insert(1)
    assert bench.evict_all() == [3, 4, 2, 1]


def test_matching_alone_does_not_keep_anything():
    bench = Bench()
    bench.insert(1)
    bench.insert(2)
    bench.match(1)
    assert bench.evict_all() == [1, 2]
    assert (bench.cache.query_tokens, bench.cache.hit_tokens) == (0, 0)


def test_unlocking_counts_as_a_use():
    bench = Bench()
    for name in (1, 2, 3):
        bench.insert(name)
    match = bench.match(1)
    bench.cache.lock(match)
    bench.hit(2)
    bench.cache.unlock(match)
    assert bench.evict_all() == [3, 2, 1]


def test_ends_go_before_beginnings_and_a_shared_beginning_goes_last():
    bench = Bench()
    bench.insert(1, 2, 3)
    bench.insert(1, 2, 4)
    bench.insert(5)
    # 3 is the oldest end; 4 and the beginning that it shares were used later, 5 last.
    assert bench.evict_all() == [3, 4, 2, 1, 5]


def test_lfu_evicts_what_was_hit_least_and_of_equals_the_oldest():
    bench = Bench("lfu")
    for name in (1, 2, 3, 4):
        bench.insert(name)
    bench.hit(1, times=3)
    bench.hit(3, times=2)
    bench.hit(4, times=2)
    bench.insert(2)  # inserting again is no hit
    assert bench.evict_all() == [2, 3, 4, 1]


def test_lfu_counts_hits_just_for_the_pages_that_were_hit():
    bench = Bench("lfu")
    bench.insert(1, 2)
    bench.insert(3)
    bench.hit(1)
    bench.hit(3)
    assert bench.evict_all() == [2, 1, 3]


def test_lfu_counts_saturate_so_that_levels_stay_few():
    bench = Bench("lfu")
    bench.insert(1)
    bench.insert(2)
    bench.hit(1, times=300)
    bench.hit(2, times=260)
    assert bench.evict_all() == [1, 2], "both saturated: the older goes first"


def test_priority_evicts_the_lowest_first_and_of_equals_the_oldest():
    bench = Bench("priority")
    for name, priority in ((1, 5), (2, -1), (3, 5), (4, 0)):
        bench.insert(name, priority=priority)
    bench.hit(1)
    assert bench.evict_all() == [2, 4, 3, 1]


def test_a_priority_lifts_the_beginning_that_it_shares():
    bench = Bench("priority")
    bench.insert(1, 2, priority=0)
    bench.insert(3, priority=4)
    bench.insert(1, 5, priority=9)
    bench.insert(1, 6, priority=-3)
    assert bench.evict_all() == [6, 2, 3, 5, 1]


def test_a_shared_prefix_keeps_the_highest_priority_it_was_inserted_with():
    bench = Bench("priority")
    bench.insert(1, priority=7)
    bench.insert(1, priority=2)
    bench.insert(2, priority=5)
    assert bench.evict_all() == [2, 1]


def test_models_share_one_order():
    bench = Bench()
    bench.insert(1, scope=bench.scope("a"))
    bench.insert(2, scope=bench.scope("b"))
    bench.insert(3, scope=bench.scope("a"))
    assert bench.evict_all() == [1, 2, 3]


def test_what_new_weights_invalidate_is_evicted_first_and_not_told():
    bench = Bench("priority")
    bench.insert(1)
    bench.insert(2, 3, priority=9, scope=bench.scope("old"))
    locked = bench.match(2, scope=bench.scope("old"))
    bench.cache.lock(locked)
    bench.cache.raise_weights_epoch("old", 1)
    assert bench.match(2, 3, scope=bench.scope("old")).num_tokens == 0
    assert bench.cache.evict(1) == 1
    bench.cache.unlock(locked)
    bench.insert(4, scope=bench.scope("old", epoch=1))
    assert bench.cache.evict(1) == 1
    assert bench.evicted == []
    assert bench.evict_all() == [1, 4]


def test_eviction_trims_an_end_page_by_page():
    bench = Bench()
    bench.insert(1, 2, 3, 4)
    assert bench.cache.evict(3) == 3
    assert bench.evicted == [4, 3, 2]
    assert bench.match(1, 2).num_tokens == PAGE


class Item(Evictable):
    __slots__ = ()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2)), max_size=40))
def test_an_eviction_order_is_by_level_and_then_by_entry(steps):
    order, expected = EvictionOrder(), []
    for stamp, (action, level) in enumerate(steps):
        if action or not expected:
            node = Item(level, stamp)
            order.append(node)
            expected.append(node)
        else:
            order.remove(expected.pop(len(expected) // 2))
        expected.sort(key=lambda node: (node.level, node.stamp))
        assert list(order) == expected
        assert order.oldest() is (expected[0] if expected else None)
        order.check_integrity()


def test_a_retired_order_passes_on_what_it_has_and_what_it_gets():
    order, grave = EvictionOrder(), UseList()
    first, second, third = Item(2, 0), Item(1, 1), Item(0, 2)
    order.append(first)
    order.append(second)
    order.retire(grave)
    order.append(third)
    assert list(grave) == [second, first, third]
    order.remove(first)
    assert list(grave) == [second, third]
    assert order.oldest() is None


def test_damage_to_an_eviction_order_is_found():
    order = EvictionOrder()
    older, newer = Item(0, 5), Item(0, 6)
    order.append(older)
    order.append(newer)
    newer.stamp = 4
    with pytest.raises(IntegrityError, match="out of order"):
        order.check_integrity()
