"""Pages of windows: who counts them, who may take them, and what becomes of entries that have none any more."""

from __future__ import annotations

import numpy as np
import pytest
from prefix_pages import scope

from engine.errors import ConfigError
from engine.memory.manager import CacheManager
from engine.memory.offload import HostTier, PageFormat

SCOPE = scope()


def make(size, windows, *, page_size=1, ahead_tokens=100):
    return CacheManager(size, page_size, 4, 400, windows=windows, ahead_tokens=ahead_tokens)


def tokens_of(count, first=0):
    return np.arange(first, first + count, dtype=np.int32)


def serve(cache, tokens, chunk=100):
    """Computes a request in chunks and ends it; returns its admission."""
    admission = cache.admit(SCOPE, tokens, most_tokens=tokens.size)
    assert admission is not None, "a request alone in the pool must be admitted"
    row, done = admission.row, admission.cached_tokens + admission.loaded_tokens
    while done < tokens.size:
        count = min(chunk, tokens.size - done)
        cache.grow([row], [count])
        done += count
        cache.take_moves()
        cache.mark_computed([row], [done])
        cache.publish(row, SCOPE, tokens)
        cache.leave_behind([row])
        cache.check_integrity()
    cache.release(row, SCOPE, tokens)
    return admission


@pytest.mark.parametrize("windows", [(4, 8), (8, 4), (None, 8, 4), (None, 4, 8)])
def test_what_a_small_window_has_left_is_evictable_while_a_large_one_holds_the_rest(windows):
    cache = make(len(windows) * 12, windows)
    serve(cache, tokens_of(12))
    assert serve(cache, tokens_of(12)).cached_tokens == 11
    admission = cache.admit(SCOPE, tokens_of(12), most_tokens=12)
    held = cache.page_table.held_pages().size
    assert cache.reclaimable_pages == cache.size - held
    cache.prefix.evict(cache.prefix.evictable_pages)
    cache.check_integrity()
    assert cache.prefix.cached_pages == held
    cache.release(admission.row, SCOPE, tokens_of(12))
    cache.check_integrity()


@pytest.mark.parametrize("windows", [(4, 8), (None, 8, 4), (None, 20, 4), (5,)])
@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("ahead_tokens", [1, 2, 7])
def test_a_request_that_fits_alone_is_admitted_whatever_is_cached_of_it(windows, page_size, ahead_tokens):
    tokens = tokens_of(24)
    pages = make(page_size, windows, page_size=page_size, ahead_tokens=ahead_tokens).demand.most_pages(tokens.size)
    cache = make(pages * page_size, windows, page_size=page_size, ahead_tokens=ahead_tokens)
    for count in (24, 24, 21, 24, 9, 24):
        serve(cache, tokens[:count], chunk=1)


@pytest.mark.parametrize("windows", [(4,), (4, 11)])
def test_without_full_attention_the_trees_do_not_outgrow_the_pool(windows):
    cache = make(256, windows, page_size=4)
    for number in range(200):
        serve(cache, tokens_of(100, 1000 * number))
    entries = sum(node.pages.size for tree in cache.prefix._forest.trees() for node in tree.nodes())
    assert entries <= 64 * 25  # each sequence has a page


@pytest.mark.parametrize("windows", [(None, 8), (4, 11)])
def test_what_is_to_be_loaded_into_a_window_is_not_computed_before_a_step_has_run(windows):
    cache = make(len(windows) * 40, windows)
    layout = {"page_size": 1, "head_num": 1, "head_dim": 1, "dtype": "float32", "version": 1}
    form = PageFormat(1, np.dtype(np.float32), layout, windows)
    tier, tokens = HostTier(100 * form.page_bytes, form), tokens_of(20)
    cache.attach_host_tier(tier)
    serve(cache, tokens)
    for group in range(len(windows)):
        tier.put(SCOPE, tokens, 0, np.zeros((20, *form.page_shape), np.float32), group)
    while cache.prefix._groups.of(cache.prefix._entries())[1].any():  # the device loses the last window
        cache.prefix.evict(1)
    admission = cache.admit(SCOPE, tokens, most_tokens=20)
    assert (admission.cached_tokens + admission.loaded_tokens, cache.page_table.kv_len(admission.row)) == (19, 19)
    assert cache.page_table.computed_len(admission.row) == admission.cached_tokens <= 19 - (windows[1] - 1)
    cache.release(admission.row, SCOPE, tokens)  # before the pages were loaded
    assert not cache.prefix._groups.of(cache.prefix._entries())[1].any(), "what was never loaded is cached"
    cache.check_integrity()


def test_a_row_that_is_extended_by_cached_pages_holds_its_window_and_no_more():
    cache = make(100, (None, 6))
    serve(cache, tokens_of(10))
    waiting = cache.admit(SCOPE, tokens_of(31))
    serve(cache, tokens_of(12))
    assert cache.share(waiting.row, SCOPE, tokens_of(31)) == 2
    cache.check_integrity()
    assert np.count_nonzero(cache.page_table.row_pages(waiting.row, 1)) == 5
    cache.release(waiting.row, SCOPE, tokens_of(31))
    cache.check_integrity()


def test_full_attention_comes_first():
    with pytest.raises(ConfigError, match="put full attention first"):
        make(100, (8, None))
