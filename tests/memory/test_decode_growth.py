"""Rows that grow by a token each, one number for all of them, against counts for each."""

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
def test_a_step_of_decoding_grows_rows_as_counts_for_each_do(lens, page_size, steps):
    (cache, rows), (plain, plain_rows) = (cache_with_rows(lens, page_size, pages=200) for _ in range(2))
    ours, theirs = cache.page_table, plain.page_table
    ours.take_new_pages(rows), theirs.take_new_pages(plain_rows)
    told = np.zeros((ours.max_requests, ours.max_pages), np.int32)
    for _ in range(steps):
        before = ours.kv_lens(rows)
        assert cache.has_room_to_grow(rows, 1)
        cache.grow(rows, 1)
        plain.grow(plain_rows, np.ones(rows.size, np.int64))
        np.testing.assert_array_equal(before + 1, ours.kv_lens(rows))  # what was handed out stays as it was
        np.testing.assert_array_equal(ours.kv_lens(rows), theirs.kv_lens(plain_rows))
        places, pages = ours.take_new_pages(rows)
        assert places.tolist() == theirs.take_new_pages(plain_rows)[0].tolist()
        assert (told.reshape(-1)[places] == 0).all()
        told.reshape(-1)[places] = pages
        cache.check_integrity()
    for row, length in zip(rows.tolist(), lens, strict=True):
        held = ours.row_pages(row)
        np.testing.assert_array_equal(told[row, -(-length // page_size) : held.size], held[-(-length // page_size) :])
    assert cache.allocator.available_size() == plain.allocator.available_size()
    assert ours.take_new_pages(rows)[0].size == 0


def test_pages_of_several_steps_are_told_together():
    cache, rows = cache_with_rows([1, 2, 3], page_size=2)
    cache.page_table.take_new_pages(rows)
    assert [each.size for each in cache.page_table.take_new_pages(rows)] == [0, 0]
    for _ in range(5):
        cache.grow(rows, 1)
    places, pages = cache.page_table.take_new_pages(rows)
    np.testing.assert_array_equal(cache.page_table.rows(np.arange(3)).reshape(-1)[places], pages)
    assert places.size == cache.page_table.held_pages().size - 4
    assert cache.page_table.take_new_pages(rows)[0].size == 0


@pytest.mark.parametrize("counts", [1, [1, 1]])
def test_without_room_nothing_changes(counts):
    cache, rows = cache_with_rows([4, 8], pages=4)
    before = cache.page_table.kv_lens(rows)
    assert not cache.has_room_to_grow(rows, counts)  # two pages begin and one is free
    with pytest.raises(KVPoolExhausted, match="cannot allocate 2 pages: 1 free"):
        cache.grow(rows, counts)
    np.testing.assert_array_equal(cache.page_table.kv_lens(rows), before)
    assert cache.allocator.available_size() == 4
    cache.check_integrity()


def test_room_is_made_by_eviction():
    cache, rows = cache_with_rows([4, 8, 8], pages=5, policy="lru")
    gone = np.arange(8, dtype=np.int32) + 200
    cache.mark_computed(rows, [4, 8, 8])
    cache.release(int(rows[2]), SCOPE, gone)
    assert cache.allocator.available_size() == 0
    assert cache.has_room_to_grow(rows[:2], 1)
    cache.grow(rows[:2], 1)
    cache.check_integrity()


@pytest.mark.parametrize("change", ["released", "released and given out again", "full"])
def test_rows_that_were_checked_before_are_checked_again_once_one_has_come_or_gone(change):
    cache, rows = cache_with_rows([4, CONTEXT - 1 if change == "full" else 8])
    cache.grow(rows, 1)
    if change.startswith("released"):
        while change == "released and given out again" and cache.page_table.available_rows:
            cache.page_table.alloc_row()  # or that row would be the last to be given out again
        cache.release(int(rows[0]), SCOPE, np.empty(0, np.int32))
        if change == "released and given out again":
            assert cache.admit(SCOPE, np.arange(4, dtype=np.int32), most_tokens=4).row == rows[0]
            cache.grow(rows, 1)
            assert cache.page_table.kv_lens(rows).tolist() == [1, 10]
            return
    free = cache.allocator.available_size()
    with pytest.raises(ShapeError, match="not in use" if change == "released" else "cannot grow to 41 tokens"):
        cache.grow(rows, 1)
    assert cache.allocator.available_size() == free
    cache.check_integrity()


@pytest.mark.parametrize("rows", [[0, 0], [3], [-1], [0.5]])
def test_only_distinct_rows_in_use_grow(rows):
    cache, good = cache_with_rows([4, 8])
    cache.grow(good, 1)
    for counts in (1, [1] * len(rows)):
        with pytest.raises(ShapeError):
            cache.grow(rows, counts)


def test_a_caller_that_changes_its_array_of_rows_is_not_taken_for_the_one_before():
    cache, rows = cache_with_rows([4, 8])
    cache.grow(rows, 1)
    rows[0] = rows[1]
    with pytest.raises(ShapeError, match="more than once"):
        cache.grow(rows, 1)
    assert cache.page_table.kv_lens([0, 1]).tolist() == [5, 9]
