"""The cache that keeps nothing: the way of a request through it, its refusals, and no page."""

import numpy as np
import pytest

from engine.errors import ConfigError, DoubleFreeError, ShapeError
from engine.memory.pages import PagedTokenToKVPoolAllocator
from engine.memory.prefix import NullPrefixCache
from engine.memory.scope import CacheScope, LayoutKey

PAGE = 2
SCOPE = CacheScope("model", 0, None, "", LayoutKey.of({"page_size": PAGE}))
TOKENS = np.arange(5, dtype=np.int32)


@pytest.fixture
def cache():
    return NullPrefixCache(PagedTokenToKVPoolAllocator(16, PAGE))


def test_a_request_goes_its_way_and_nothing_is_kept(cache):
    pool = cache.allocator.pages
    pages = pool.take([2])
    for _ in range(2):
        found = cache.match(SCOPE, TOKENS, whole=True)
        assert (found.num_tokens, found.num_queried, found.pages.size) == (0, 5, 0)
        cache.lock(found)
        cache.record(found)
        assert cache.insert(SCOPE, TOKENS, pages) == 0
        assert cache.advance(found, SCOPE, TOKENS, pages, priority=3) is found
        cache.finish(found, SCOPE, TOKENS, pages)
        assert found.locks == 0
    assert not cache.is_cached(pages).any()
    assert cache.pages().size == len(list(cache.runs())) == cache.evict(3) == cache.reset() == cache.reset(SCOPE) == 0
    assert cache.evictable_pages == cache.protected_pages == cache.cached_pages == 0
    assert (cache.query_tokens, cache.hit_tokens, cache.evicted_pages) == (0, 0, 0)
    cache.raise_weights_epoch("model", 1)
    cache.clear()
    cache.check_integrity()
    pool.check_integrity(pages)


def test_what_the_real_cache_refuses_is_refused(cache):
    other = NullPrefixCache(cache.allocator)
    found = cache.match(SCOPE, TOKENS)
    for call in (cache.unlock, lambda match: cache.advance(match, SCOPE, TOKENS, [1, 2]), other.lock, other.record):
        with pytest.raises(DoubleFreeError):
            call(found)
    cache.lock(found)
    with pytest.raises(DoubleFreeError):
        other.unlock(found)
    with pytest.raises(ConfigError):
        cache.match("scope", TOKENS)
    with pytest.raises(ShapeError):
        cache.match(SCOPE, [TOKENS])
    with pytest.raises(ShapeError):
        cache.insert(SCOPE, TOKENS, [1, 2], priority=0.5)
    with pytest.raises(ShapeError):
        cache.evict(-1)
    cache.unlock(found)
