"""What calls cost, in nodes visited rather than in seconds: never a walk of the whole cache."""

import numpy as np
import pytest

from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator
from engine.memory.prefix.cache import RadixCache
from engine.memory.prefix.eviction import EvictionOrder
from engine.memory.prefix.tree import PrefixForest, RadixNode, RadixTree
from engine.memory.scope import CacheScope, LayoutKey

PAGE, LEAVES = 2, 500
SCOPE = CacheScope("model", 0, None, "", LayoutKey.of({"page_size": PAGE}))


@pytest.fixture(params=["lru", "lfu", "priority"])
def cache(request):
    """Many leaves of two pages below one shared page, each used at another time."""
    allocator = PagedTokenToKVPoolAllocator(PAGE * (3 * LEAVES), PAGE)
    cache = RadixCache(allocator, PAGE, policy=request.param)
    rng = np.random.default_rng()
    for leaf in range(LEAVES):
        pages = allocator.alloc(3 * PAGE)[::PAGE] // PAGE
        cache.insert(SCOPE, sequence(leaf), pages, priority=int(rng.integers(5)))
        allocator.pages.release(pages)
    for leaf in rng.permutation(LEAVES).tolist():
        cache.record(cache.match(SCOPE, np.append(sequence(leaf), 0)))
    return cache


def sequence(leaf):
    return np.array([7, 7, leaf, leaf, leaf, leaf], np.int32)


@pytest.fixture
def visits(monkeypatch):
    """Counts the steps along lists, paths, trees and edges from here on."""
    counted = []

    def count(owner, name):
        original = getattr(owner, name)

        def counting(self, *args):
            counted.append(name)
            return original(self, *args)

        monkeypatch.setattr(owner, name, counting)

    for owner, name in [
        (EvictionOrder, "append"),
        (EvictionOrder, "remove"),
        (EvictionOrder, "oldest"),
        (PrefixForest, "attach"),
        (PrefixForest, "split"),
        (PrefixForest, "cut"),
        (RadixNode, "path"),
    ]:
        count(owner, name)

    def refuse(self):
        raise AssertionError("the whole tree was walked")

    monkeypatch.setattr(RadixTree, "nodes", refuse)
    monkeypatch.setattr(EvictionOrder, "__iter__", refuse)
    return counted


def test_evicting_costs_a_few_steps_a_page_whatever_was_used_since(cache, visits):
    most = 0
    while cache.evict(1):
        most = max(most, len(visits))
        visits.clear()
    assert most <= 3  # oldest, cut, remove


def test_match_lock_and_unlock_visit_their_own_path(cache, visits):
    match = cache.match(SCOPE, np.append(sequence(LEAVES // 2), 0))
    assert len(visits) == 0
    cache.lock(match)
    assert len(visits) <= 3  # one path of two nodes, each out of the order
    cache.unlock(match)
    assert len(visits) <= 6


def test_inserting_visits_its_own_path(cache, visits):
    cache.evict(3)
    pages = cache.allocator.alloc(3 * PAGE)[::PAGE] // PAGE
    visits.clear()
    cache.insert(SCOPE, np.array([7, 7, -1, -1, -1, -1], np.int32), pages)
    assert len(visits) <= 7  # attach, append, path, and two nodes out of the order and in again


def test_raising_the_epoch_visits_no_node(cache, visits):
    cache.raise_weights_epoch("model", 1)
    assert visits == []
    assert cache.evict(10) == 10


def test_a_long_sequence_is_one_edge(cache):
    tokens = np.random.default_rng().integers(8, 100, PAGE * 400).astype(np.int32)
    cache.evict(400)
    pages = cache.allocator.alloc(PAGE * 400)[::PAGE] // PAGE
    cache.insert(SCOPE, tokens, pages)
    match = cache.match(SCOPE, np.append(tokens, 0))
    assert match.num_tokens == tokens.size
    assert len(list(match.node.path())) == 1
