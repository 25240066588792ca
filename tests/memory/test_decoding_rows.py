"""Rows that decode together against the same rows grown one call at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import KVPoolExhausted, ShapeError
from engine.memory.manager import CacheManager
from engine.memory.scope import CacheScope, LayoutKey

SCOPE = CacheScope("model", 0, None, "", LayoutKey.of({"version": 1}))
CONTEXT = 40


def cache_with_rows(lens, page_size=4, pages=40, policy=None):
    cache = CacheManager(pages * page_size, page_size, len(lens) + 1, CONTEXT, policy=policy)
    prompts = [np.arange(length, dtype=np.int32) + 100 * i for i, length in enumerate(lens)]
    rows = [cache.admit(SCOPE, prompt, most_tokens=prompt.size).row for prompt in prompts]
    rows = np.array(rows, np.int32)
    cache.grow(rows, np.array(lens, np.int64))
    return cache, rows


@given(lens=st.lists(st.integers(1, 20), min_size=1, max_size=5), page_size=st.integers(1, 9), steps=st.integers(1, 20))
def test_rows_grow_as_one_by_one(lens, page_size, steps):
    (cache, rows), (plain, plain_rows) = (cache_with_rows(lens, page_size, pages=200) for _ in range(2))
    ours, theirs = cache.page_table, plain.page_table
    ours.take_new_pages(rows), theirs.take_new_pages(plain_rows)
    together = ours.decoding_rows(rows)
    told = np.zeros((ours.max_requests, ours.max_pages), np.int32)
    for _ in range(steps):
        before = together.lens
        assert cache.has_room_to_decode(together)
        cache.grow_decoding(together)
        plain.grow(plain_rows, np.ones(rows.size, np.int64))
        np.testing.assert_array_equal(before + 1, together.lens)  # what was handed out stays as it was
        np.testing.assert_array_equal(together.lens, theirs.kv_lens(plain_rows))
        np.testing.assert_array_equal(ours.kv_lens(rows), theirs.kv_lens(plain_rows))
        places, pages = together.take_new_pages()
        assert sorted(places.tolist()) == sorted(theirs.take_new_pages(plain_rows)[0].tolist())
        assert (told.reshape(-1)[places] == 0).all()
        told.reshape(-1)[places] = pages
        cache.check_integrity()
    for row, length in zip(rows.tolist(), lens, strict=True):
        held = ours.row_pages(row)
        np.testing.assert_array_equal(told[row, -(-length // page_size) : held.size], held[-(-length // page_size) :])
    assert cache.allocator.pages.available == plain.allocator.pages.available
    assert ours.take_new_pages(rows)[0].size == 0


def test_pages_of_several_steps_are_told_together():
    cache, rows = cache_with_rows([1, 2, 3], page_size=2)
    cache.page_table.take_new_pages(rows)
    together = cache.page_table.decoding_rows(rows)
    assert [each.size for each in together.take_new_pages()] == [0, 0]
    for _ in range(5):
        cache.grow_decoding(together)
    places, pages = together.take_new_pages()
    np.testing.assert_array_equal(cache.page_table.rows(np.arange(3)).reshape(-1)[places], pages)
    assert places.size == cache.page_table.held_pages().size - 4
    assert cache.page_table.take_new_pages(rows)[0].size == 0


def test_without_room_nothing_changes():
    cache, rows = cache_with_rows([4, 8], pages=4)
    together = cache.page_table.decoding_rows(rows)
    before = cache.page_table.kv_lens(rows)
    assert not cache.has_room_to_decode(together)  # two pages begin and one is free
    with pytest.raises(KVPoolExhausted, match="cannot allocate 2 pages: 1 free"):
        cache.grow_decoding(together)
    np.testing.assert_array_equal(cache.page_table.kv_lens(rows), before)
    np.testing.assert_array_equal(together.lens, before)
    assert cache.allocator.pages.available == 1
    cache.check_integrity()


def test_room_is_made_by_eviction():
    cache, rows = cache_with_rows([4, 8, 8], pages=5, policy="lru")
    gone = np.arange(8, dtype=np.int32) + 200
    cache.release(int(rows[2]), SCOPE, gone)
    together = cache.page_table.decoding_rows(rows[:2])
    assert cache.allocator.pages.available == 0
    assert cache.has_room_to_decode(together)
    cache.grow_decoding(together)
    cache.check_integrity()


@pytest.mark.parametrize("change", ["grown", "released", "released and given out again", "full"])
def test_rows_that_have_changed_otherwise_are_refused(change):
    cache, rows = cache_with_rows([4, CONTEXT if change == "full" else 8])
    together = cache.page_table.decoding_rows(rows)
    if change == "grown":
        cache.grow(rows[:1], np.array([3], np.int64))
    elif change.startswith("released"):
        while change == "released and given out again" and cache.page_table.available_rows:
            cache.page_table.alloc_row()  # or that row would be the last to be given out again
        cache.release(int(rows[0]), SCOPE, np.empty(0, np.int32))
        if change == "released and given out again":
            assert cache.admit(SCOPE, np.arange(4, dtype=np.int32), most_tokens=4).row == rows[0]
            cache.grow(rows[:1], np.array([4], np.int64))
    free = cache.allocator.pages.available
    with pytest.raises(ShapeError, match="decode together"):
        cache.grow_decoding(together)
    assert cache.allocator.pages.available == free
    cache.check_integrity()


@pytest.mark.parametrize("rows", [[0, 0], [3], [-1], [0.5]])
def test_only_distinct_rows_in_use_are_taken_together(rows):
    cache, _ = cache_with_rows([4, 8])
    with pytest.raises(ShapeError):
        cache.page_table.decoding_rows(rows)
