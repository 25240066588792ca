"""Rows of several groups over one heap: what leaves with a window, what is refused, what a request takes."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import ConfigError, KVPoolExhausted, RequestTooLarge, ShapeError
from engine.memory.manager import CacheManager
from engine.memory.rows import ReqToTokenPool
from engine.memory.scope import CacheScope, LayoutKey

PAGE, WINDOW = 4, 10
SCOPE = CacheScope("model", 0, None, "", LayoutKey.of({"version": 1}))


def make_cache(windows=(None, WINDOW, WINDOW), pages=90, **options):
    return CacheManager(pages * PAGE, PAGE, 4, 120, windows=windows, **options)


def compute(cache, row, count, text):
    """A step that computes ``count`` more tokens of a row, and publishes them."""
    cache.grow([row], [count])
    cache.mark_computed([row], cache.page_table.kv_lens([row]))
    cache.publish(row, SCOPE, text)
    cache.leave_behind([row])
    cache.check_integrity()


def state(cache):
    table = cache.page_table
    rows = table.rows_in_use().tolist()
    books = [(row, table.kv_len(row), table.computed_len(row), table.pages_by_group(row).tolist()) for row in rows]
    return books, cache.reclaimable_pages, cache.prefix.cached_pages, cache.prefix.hit_tokens


@pytest.mark.parametrize("length", range(1, 41))
def test_just_what_the_next_token_sees_of_a_window_is_held(length):
    cache, text = make_cache(policy=None), np.arange(length, dtype=np.int32)
    row = cache.admit(SCOPE, text).row
    compute(cache, row, length, text)
    first = max(0, length - WINDOW + 1)  # the earliest position that token ``length`` sees
    for group in range(3):
        kept = [column >= first // PAGE or group == 0 for column in range(-(-length // PAGE))]
        assert (cache.page_table.row_pages(row, group) > 0).tolist() == kept
    assert cache.held_tokens == PAGE * np.count_nonzero(cache.page_table.pages_by_group(row))


def test_what_a_window_leaves_serves_another_group_at_once():
    cache, text = make_cache(pages=16, policy=None, ahead_tokens=PAGE), np.arange(24, dtype=np.int32)
    row = cache.admit(SCOPE, text).row
    for _ in range(6):  # without leaving it would take 3 x 6 pages
        compute(cache, row, PAGE, text)
    assert cache.page_table.kv_len(row) == 24


def test_a_prefix_is_a_hit_only_where_each_window_has_its_last_pages():
    cache, text = make_cache(), np.arange(61, dtype=np.int32)
    row = cache.admit(SCOPE, text).row
    compute(cache, row, 60, text)
    cache.release(row, SCOPE, text)
    assert cache.cached_tokens(SCOPE, text) == 60
    idle = cache.prefix._groups.idle_pages
    assert cache.prefix.evict(1) > 0  # the first to go come from the middle
    assert (cache.cached_tokens(SCOPE, text), cache.prefix._groups.idle_pages) == (60, idle - 2)
    again = cache.admit(SCOPE, text)
    assert again.cached_tokens == 60
    held = cache.page_table.pages_by_group(again.row) > 0
    assert held.sum(axis=1).tolist() == [15, 3, 3]
    cache.check_integrity()


def test_windows_give_way_and_prefixes_of_full_attention_stay():
    cache = make_cache((None, WINDOW), pages=72, ahead_tokens=PAGE)
    texts = [np.arange(48, dtype=np.int32) + 1000 * index for index in range(4)]
    for text in texts:  # whole sequences in both groups would be 4 x 24 pages
        row = cache.admit(SCOPE, text).row
        for _ in range(12):
            compute(cache, row, PAGE, text)
        cache.release(row, SCOPE, text)
    assert [cache.cached_tokens(SCOPE, np.append(text, 9).astype(np.int32)) for text in texts] == [48] * 4


@pytest.mark.parametrize("policy", ["lru", "lfu", "priority"])
def test_all_that_is_cached_can_be_evicted(policy):
    cache, text = make_cache(policy=policy), np.arange(80, dtype=np.int32)
    for salt in range(3):
        row = cache.admit(SCOPE, text + salt % 2).row
        compute(cache, row, 80 - cache.page_table.kv_len(row), text + salt % 2)
        cache.release(row, SCOPE, text + salt % 2)
    cached = cache.prefix.cached_pages
    assert cache.prefix.evict(10_000) == cached > 0
    assert (cache.prefix.cached_pages, cache.reclaimable_pages) == (0, 90)
    cache.check_integrity()


def test_a_page_larger_than_a_window_is_refused():
    with pytest.raises(ConfigError, match=r"page_size=4 tokens is larger than a window of 3.*lower page_size to 3"):
        make_cache((None, 3))


@pytest.mark.parametrize("windows", [(), (0,), (None, -1), (None, True), (None, 2.5)])
def test_windows_that_are_none_are_refused(windows):
    with pytest.raises(ConfigError):
        ReqToTokenPool(2, 40, PAGE, windows)


def test_a_row_is_not_cut_back_behind_what_its_window_has_left():
    cache, text = make_cache(), np.arange(40, dtype=np.int32)
    row = cache.admit(SCOPE, text).row
    compute(cache, row, 40, text)  # the first page kept is 7, of positions 28 on; token 40 sees 31 on
    before = state(cache)
    for tokens in (36, 10, 1):
        with pytest.raises(ShapeError, match=f"cannot truncate row 0 to {tokens} tokens: in group 1 .* keep 37 tokens"):
            cache.truncate(row, tokens)
        assert state(cache) == before
    cache.truncate(row, 37)
    cache.check_integrity()
    cache.truncate(row, 0)  # begins anew
    assert not cache.page_table.pages_by_group(row).size
    compute(cache, row, 12, text)


def test_a_fork_behind_a_window_is_refused_and_one_at_the_end_shares_the_window():
    cache, text = make_cache(), np.arange(40, dtype=np.int32)
    row = cache.admit(SCOPE, text).row
    compute(cache, row, 40, text)
    before = state(cache)
    assert not cache.can_fork(row, 20)
    with pytest.raises(ShapeError, match="a window has left behind"):
        cache.fork(row, 20)
    assert state(cache) == before
    child = cache.fork(row, 38)
    shared = cache.page_table.pages_by_group(child) == cache.page_table.pages_by_group(row)
    assert shared[:, :9].all()
    assert not shared[:, 9].any()
    (copy,) = cache.take_moves()
    assert len(copy.sources) == len(copy.targets) == 3
    cache.check_integrity()


def test_slots_exist_only_for_tokens_that_are_held():
    cache, text = make_cache(policy=None), np.arange(40, dtype=np.int32)
    row = cache.admit(SCOPE, text).row
    compute(cache, row, 40, text)
    table = cache.page_table
    assert table.slots(row, 0, 40).size == 40
    assert table.slots(row, 28, 40, group=1).tolist() == [
        int(table.row_pages(row, 1)[position // PAGE]) * PAGE + position % PAGE for position in range(28, 40)
    ]
    with pytest.raises(ShapeError, match="no token 27 in group 1"):
        table.slots(row, 27, 40, group=1)
    for group in (3, -1, None, True):
        with pytest.raises(ShapeError, match="no group"):
            table.rows([row], group)
    with pytest.raises(ShapeError, match="3 groups"):
        table.write_slots([row], [40], [1], [PAGE])


def test_null_pages_are_accepted_only_behind_a_window():
    table = ReqToTokenPool(2, 120, PAGE, (None, WINDOW))
    row = table.alloc_row()
    refused = [
        [[1, 2, 0, 4, 5], [0, 0, 6, 7, 8]],  # full attention keeps every page
        [[1, 2, 3, 4, 5], [0, 0, 0, 7, 8]],  # the next token sees page 2
        [[1, 2, 3, 4, 5], [6, 7, 0, 8, 9]],
        [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]],  # a page of two groups
        [[1, 2, 3, 4, 5]],
    ]
    for pages in refused:
        with pytest.raises(ShapeError):
            table.append_pages(row, pages)
        assert (table.kv_len(row), table.held_pages().size) == (0, 0)
    table.append_pages(row, [[1, 2, 3, 4, 5], [0, 0, 6, 7, 8]])
    assert table.append_pages(row, [[9, 10, 11], [0, 12, 13]], goes_on_at=34).tolist() == [6, 7, 8]
    growth = table.plan_growth([row], [2])
    table.grow(growth, np.array([14, 15], np.int32))
    table.check_integrity()


def test_refusals_say_what_each_group_takes():
    cache = make_cache((None, WINDOW), pages=20, ahead_tokens=PAGE)
    with pytest.raises(RequestTooLarge, match=r"in 25 pages, 20 of full attention and 5 of a window of 10"):
        cache.admit(SCOPE, np.arange(80, dtype=np.int32))
    row = cache.admit(SCOPE, np.arange(30, dtype=np.int32), most_tokens=60).row
    before = state(cache)
    with pytest.raises(KVPoolExhausted, match="22 pages for 2 groups of 11 each: 20 free"):
        cache.grow([row], [44])
    assert state(cache) == before


def test_the_rule_of_admission_promises_the_pages_of_every_step():
    """No chunk of a prompt that was admitted is short of pages, whatever runs beside it."""
    draw = np.random.default_rng(3)
    for _ in range(40):
        windows = [(None, 5), (None, 9, 9), (7,), (None, 4, 13)][draw.integers(4)]
        budget = int(draw.choice([3, 8, 20]))
        cache = make_cache(windows, pages=int(draw.integers(30, 70)), policy=None, ahead_tokens=budget)
        waiting = [(int(draw.integers(1, 40)), int(draw.integers(1, 12))) for _ in range(12)]
        running: dict[int, tuple[int, int]] = {}
        while waiting or running:
            for known, more in list(waiting[:2]):
                try:
                    found = cache.admit(SCOPE, np.arange(known, dtype=np.int32), most_tokens=known + more)
                except RequestTooLarge:
                    waiting.remove((known, more))
                    continue
                if found is None:
                    break
                waiting.remove((known, more))
                running[found.row] = known, known + more
            left, rows, counts = budget, [], []
            for row, (known, most) in running.items():
                have = cache.page_table.kv_len(row)
                count = min(left, known - have if have < known else 1, most - have)
                if count > 0:
                    left -= count
                    rows.append(row)
                    counts.append(count)
            fits = cache.has_room_to_grow(np.array(rows), np.array(counts))
            decoding = sum(cache.page_table.kv_len(row) >= running[row][0] for row in rows)
            assert fits or decoding, "a chunk of a prompt that was admitted has no pages"
            if not fits:  # longer answers than were promised: give one back, as a scheduler does
                cache.release(rows[-1], SCOPE, np.zeros(0, np.int32))
                del running[rows[-1]]
                continue
            cache.grow(rows, counts)
            cache.mark_computed(rows, cache.page_table.kv_lens(rows))
            cache.leave_behind(rows)
            cache.check_integrity()
            for row in rows:
                if cache.page_table.kv_len(row) >= running[row][1]:
                    cache.release(row, SCOPE, np.zeros(0, np.int32))
                    del running[row]
