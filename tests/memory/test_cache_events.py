"""Events of the prefix cache tell one who follows them all that it finds; the state machines follow them too."""

import numpy as np
import pytest
from cache_mirror import CacheMirror

from engine import CacheManager, CacheScope, EventsMissed, LayoutKey, PagedTokenToKVPoolAllocator, RadixCache
from engine.errors import ConfigError, ShapeError

SCOPE = CacheScope("model", 0, None, "", LayoutKey.of({"version": 1}))
PAGE = 4


def insert(cache, tokens):
    pages = cache.allocator.alloc(len(tokens))[::PAGE] // PAGE
    cache.insert(SCOPE, tokens, pages)
    cache.allocator.pages.release(pages)
    return pages


def make(max_events):
    return RadixCache(PagedTokenToKVPoolAllocator(64 * PAGE, PAGE), PAGE, max_events=max_events)


def test_a_sequence_that_parts_from_another_names_the_page_that_both_have():
    rng, cache = np.random.default_rng(), make(100)
    trunk = rng.integers(0, 1000, 5 * PAGE).tolist()
    first = insert(cache, trunk)
    insert(cache, [*trunk[: 3 * PAGE], *rng.integers(1000, 2000, PAGE).tolist()])
    events = cache.take_events()
    assert [event.parent_page for event in events] == [0, first[2]]
    assert events[1].token_ids.size == PAGE
    assert not cache.take_events()


def test_events_that_nobody_takes_are_dropped_and_said_to_be_missed():
    rng, cache = np.random.default_rng(), make(3)
    mirror = CacheMirror(cache)
    for _ in range(4):
        insert(cache, rng.integers(0, 2**31 - 1, PAGE).tolist())
    cache.evict(2)
    assert mirror.follow()
    assert mirror.prefixes == mirror.found()
    insert(cache, rng.integers(0, 2**31 - 1, 2 * PAGE).tolist())
    assert not mirror.follow()
    assert mirror.prefixes == mirror.found()
    assert len(mirror.prefixes) == 4


def test_a_page_whose_loss_could_not_be_noted_makes_the_events_missed(monkeypatch):
    cache = make(10)
    insert(cache, list(range(2 * PAGE)))
    cache.take_events()

    def fail(event):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cache._events, "_note", fail)
        with pytest.raises(MemoryError):
            cache.evict(1)
    assert cache.take_events() == [EventsMissed()]
    cache.check_integrity()


def test_without_a_bound_there_are_no_events():
    cache = make(0)
    insert(cache, list(range(PAGE)))
    assert cache.take_events() == []


def test_events_need_a_group_with_full_attention_and_a_whole_number():
    with pytest.raises(ConfigError, match="there is none"):
        CacheManager(64, PAGE, 2, 32, windows=(8,), max_events=10)
    with pytest.raises(ShapeError, match="max_events"):
        CacheManager(64, PAGE, 2, 32, max_events=-1)
