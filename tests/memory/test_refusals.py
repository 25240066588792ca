"""What is no number, no array, no object of the contract is refused by name wherever it enters, and changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from prefix_pages import PAGE_SIZE, page_format, random_pages
from prefix_pages import scope as make_scope

from engine.errors import ConfigError, DoubleFreeError, EngineError, RequestTooLarge, ShapeError
from engine.memory.manager import CacheManager
from engine.memory.offload.host_tier import HostTier
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator
from engine.memory.prefix.cache import RadixCache
from engine.memory.rows import ReqToTokenPool

PAGE = PAGE_SIZE
SCOPE = make_scope()
FORM = page_format(np.float32)
HUGE = np.array([2**64 - 1], np.uint64)
NO_VECTORS = [
    HUGE,
    [2**63],
    [2**70],
    [True],
    [1.0],
    [float("nan")],
    np.array([1], object),
    "1",
    None,
    1,
    [[1]],
    [[1], [1, 2]],
]
NO_COUNTS = [-1, -(2**63), 1.5, float("nan"), float("inf"), True, None, "1", [1], np.array([1])]
NO_ROWS = [-1, 99, 2**63, 1.0, True, None, "0", [0], 2]


@pytest.fixture
def cache():
    cache = CacheManager(64, PAGE, 4, 48, policy="priority")
    for count in (9, 6):
        tokens = np.arange(count, dtype=np.int32)
        row = cache.admit(SCOPE, tokens).row
        missing = count - int(cache.page_table.kv_len(row))
        cache.grow([row], [missing])
        cache.mark_computed([row], [count])
        cache.publish(row, SCOPE, tokens)
    return cache


def picture(cache):
    table, ledger = cache.page_table, cache.allocator.pages
    arrays = (
        table._table,
        table._granted,
        table._computed,
        table._known,
        table._most,
        table._in_use,
        table._told,
        ledger._ref_count,
        ledger._births,
    )
    prefix = cache.prefix
    counts = (
        prefix.evictable_pages,
        prefix.protected_pages,
        prefix.hit_tokens,
        prefix.query_tokens,
        prefix.evicted_pages,
    )
    return [array.tolist() for array in arrays], counts, ledger.clock, list(cache.page_table._free_rows)


def refused(cache, call, errors=(ShapeError,)):
    before = picture(cache)
    with pytest.raises(errors) as caught:
        call()
    assert isinstance(caught.value, EngineError)
    assert str(caught.value)
    assert picture(cache) == before
    cache.check_integrity()


VECTOR_CALLS = {
    "match": lambda c, v: c.prefix.match(SCOPE, v),
    "insert tokens": lambda c, v: c.prefix.insert(SCOPE, v, []),
    "insert pages": lambda c, v: c.prefix.insert(SCOPE, [1, 2, 3, 4], v),
    "is_cached": lambda c, v: c.prefix.is_cached(v),
    "admit": lambda c, v: c.admit(SCOPE, v),
    "cached_tokens": lambda c, v: c.cached_tokens(SCOPE, v),
    "publish": lambda c, v: c.publish(0, SCOPE, v),
    "share": lambda c, v: c.share(0, SCOPE, v),
    "grow rows": lambda c, v: c.grow(v, [1]),
    "grow rows by one": lambda c, v: c.grow(v, 1),
    "grow counts": lambda c, v: c.grow([0], 1.5 if isinstance(v, int) else v),
    "has_room_to_grow rows": lambda c, v: c.has_room_to_grow(v, 1),
    "has_room_to_grow counts": lambda c, v: c.has_room_to_grow([0], 1.5 if isinstance(v, int) else v),
    "mark_computed rows": lambda c, v: c.mark_computed(v, [1]),
    "mark_computed tokens": lambda c, v: c.mark_computed([0], v),
    "append_pages": lambda c, v: c.page_table.append_pages(c.page_table.alloc_row(), v),
    "write_slots": lambda c, v: c.page_table.write_slots([0], [9], [1], v),
    "last_loc": lambda c, v: c.page_table.last_loc([0], v),
    "kv_lens": lambda c, v: c.page_table.kv_lens(v),
    "rows": lambda c, v: c.page_table.rows(v),
    "take_new_pages": lambda c, v: c.page_table.take_new_pages(v),
    "alloc_extend": lambda c, v: c.allocator.alloc_extend([0], v, [-1]),
    "alloc_extend prefix": lambda c, v: c.allocator.alloc_extend(v, [3], [-1]),
    "alloc_extend last": lambda c, v: c.allocator.alloc_extend([0], [1], v),
    "alloc_decode": lambda c, v: c.allocator.alloc_decode(v, [-1]),
    "take": lambda c, v: c.allocator.pages.take(v),
    "free": lambda c, v: c.allocator.free(v),
    "retain": lambda c, v: c.allocator.pages.retain(v),
    "release": lambda c, v: c.allocator.pages.release(v),
    "ref_count": lambda c, v: c.allocator.pages.ref_count(v),
}


@pytest.mark.parametrize("name", [name for name in VECTOR_CALLS if name != "append_pages"])
@pytest.mark.parametrize("value", NO_VECTORS, ids=repr)
def test_what_is_no_vector_of_int64_is_refused(cache, name, value):
    refused(cache, lambda: VECTOR_CALLS[name](cache, value))


COUNT_CALLS = {
    "evict": lambda c, v: c.prefix.evict(v),
    "alloc": lambda c, v: c.allocator.alloc(v),
    "take_singles": lambda c, v: c.allocator.pages.take_singles(v),
    "alloc_rows": lambda c, v: c.page_table.alloc_rows(v),
    "full_pages": lambda c, v: c.page_table.full_pages(0, v),
    "slots start": lambda c, v: c.page_table.slots(0, v, 2),
    "slots stop": lambda c, v: c.page_table.slots(0, 0, v),
    "truncate": lambda c, v: c.truncate(0, v),
    "fork": lambda c, v: c.fork(0, v),
    "can_fork": lambda c, v: c.can_fork(0, v),
    "most_tokens": lambda c, v: c.admit(SCOPE, [7], most_tokens=0 if v is None else v),
}


@pytest.mark.parametrize("name", COUNT_CALLS)
@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_what_is_no_count_is_refused(cache, name, value):
    refused(cache, lambda: COUNT_CALLS[name](cache, value))


ROW_CALLS = {
    "kv_len": lambda c, v: c.page_table.kv_len(v),
    "row_pages": lambda c, v: c.page_table.row_pages(v),
    "full_pages": lambda c, v: c.page_table.full_pages(v, 1),
    "slots": lambda c, v: c.page_table.slots(v, 0, 0),
    "row release": lambda c, v: c.page_table.release(v),
    "append_pages": lambda c, v: c.page_table.append_pages(v, []),
    "locked_pages": lambda c, v: c.locked_pages(v),
    "publish": lambda c, v: c.publish(v, SCOPE, [1]),
    "release": lambda c, v: c.release(v, SCOPE, [1]),
    "fork": lambda c, v: c.fork(v, 0),
    "can_fork": lambda c, v: c.can_fork(v, 0),
    "share": lambda c, v: c.share(v, SCOPE, [1]),
    "truncate": lambda c, v: c.truncate(v, 0),
    "grow": lambda c, v: c.grow([v], [1]),
    "grow by one": lambda c, v: c.grow([v], 1),
    "has_room_to_grow": lambda c, v: c.has_room_to_grow([v], [1]),
    "mark_computed": lambda c, v: c.mark_computed([v], [0]),
}


@pytest.mark.parametrize("name", ROW_CALLS)
@pytest.mark.parametrize("value", NO_ROWS, ids=repr)
def test_what_is_no_row_in_use_is_refused(cache, name, value):
    refused(cache, lambda: ROW_CALLS[name](cache, value), (ShapeError, DoubleFreeError))


@pytest.mark.parametrize("priority", [float("nan"), 1.5, 2**63, -(2**63) - 1, True, None, "high", [1]])
def test_a_priority_is_an_integer_of_64_bits(cache, priority):
    pages = cache.page_table.row_pages(0)[:1]
    refused(cache, lambda: cache.admit(SCOPE, [7], priority=priority))
    refused(cache, lambda: cache.prefix.insert(SCOPE, [7, 7, 7, 7], pages, priority=priority))
    cache.prefix.insert(SCOPE, np.arange(4), pages, priority=-(2**63))


def test_numbers_that_wrap_round_hit_nothing(cache):
    token_ids = np.array([-1, -2, -3, -4], np.int32)
    row = cache.admit(SCOPE, np.append(token_ids, 5)).row
    cache.grow([row], [5])
    cache.mark_computed([row], [5])
    cache.publish(row, SCOPE, np.append(token_ids, 5))
    assert cache.cached_tokens(SCOPE, np.append(token_ids, 6)) == 4
    refused(cache, lambda: cache.cached_tokens(SCOPE, np.append(token_ids, 6).astype(np.int64).astype(np.uint64)))
    for count in (2**63 - 1, 2**62, 2**31):
        refused(cache, lambda count=count: cache.grow([row], [count]))
        refused(cache, lambda count=count: cache.grow([row], count))
        refused(cache, lambda count=count: cache.page_table.write_slots([row], [5], [count], []))
    refused(cache, lambda: cache.page_table.write_slots([row, 0], [5, 9], [2**63 - 1, 2**63 - 1], [1] * 6))


@pytest.mark.parametrize(
    "make",
    [
        lambda: RadixCache(4, PagedTokenToKVPoolAllocator(64, 4)),
        lambda: RadixCache(None, 4),
        lambda: RadixCache(PagedTokenToKVPoolAllocator(64, 4), None),
        lambda: RadixCache(PagedTokenToKVPoolAllocator(64, 4), 8),
        lambda: RadixCache(PagedTokenToKVPoolAllocator(64, 4), 4, policy=["lru"]),
        lambda: RadixCache(PagedTokenToKVPoolAllocator(64, 4), 4, on_evict=5),
        lambda: PagedTokenToKVPoolAllocator("64", 4),
        lambda: PagedTokenToKVPoolAllocator(64, 4.0),
        lambda: PagedTokenToKVPoolAllocator(np.array([64]), 4),
        lambda: ReqToTokenPool(2, None, 4),
        lambda: ReqToTokenPool(True, 32, 4),
        lambda: ReqToTokenPool(2**31 - 1, 2**31 - 1, 1),
        lambda: CacheManager(64, 4, 2, 1.5),
        lambda: CacheManager(64, 4, 2, 32, policy="fifo"),
        lambda: CacheManager(64, 4, 2, 32).attach_host_tier(None),
        lambda: CacheManager(64, 8, 2, 32).attach_host_tier(HostTier(FORM.page_bytes, FORM)),
        lambda: HostTier(FORM, 1024),
        lambda: HostTier(1e6, FORM),
        lambda: HostTier(True, FORM),
        lambda: HostTier(-1, FORM),
        lambda: HostTier(2**90, FORM),
        lambda: RadixCache(PagedTokenToKVPoolAllocator(64, 4), 4).reset("scope"),
        lambda: RadixCache(PagedTokenToKVPoolAllocator(64, 4), 4).raise_weights_epoch("m", float("nan")),
        lambda: CacheManager(64, 4, 2, 32, policy=None).admit("scope", [1]),
    ],
)
def test_wrong_arguments_of_constructors_are_refused_by_the_contract(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize("match", [None, 4, "match", [1]])
def test_what_is_no_match_of_this_cache_is_refused(cache, match):
    for call in (cache.prefix.lock, cache.prefix.unlock, cache.prefix.record):
        refused(cache, lambda call=call: call(match), (DoubleFreeError,))
    other = RadixCache(PagedTokenToKVPoolAllocator(64, PAGE), PAGE)
    theirs = other.match(SCOPE, [1, 2])
    other.lock(theirs)
    for call in (cache.prefix.lock, cache.prefix.unlock, cache.prefix.record):
        refused(cache, lambda call=call: call(theirs), (DoubleFreeError,))


@pytest.mark.parametrize("number", [1.0, True, None, "0", float("nan"), 2**70])
def test_a_host_tier_refuses_what_is_no_page_number(number):
    tier, data = HostTier(4 * FORM.page_bytes, FORM), random_pages(np.random.default_rng(), FORM, 1)
    for call in (
        lambda: tier.put(SCOPE, np.arange(4), number, data),
        lambda: tier.put(SCOPE, np.arange(4), 0, data, number),
        lambda: tier.get(SCOPE, np.arange(4), number),
        lambda: tier.get(SCOPE, np.arange(4), 0, group=number),
        lambda: tier.held(SCOPE, np.arange(4), group=number),
        lambda: tier.put(SCOPE, np.arange(4), 0, data.tolist()),
    ):
        with pytest.raises(ShapeError):
            call()
    with pytest.raises(ConfigError):
        tier.get("scope", np.arange(4), 0)
    tier.check_integrity()


def test_what_can_never_be_let_in_is_told_from_what_must_wait():
    cache = CacheManager(64, PAGE, 4, 200)
    for token_ids, most in (
        (np.zeros(65, np.int32), None),
        (np.zeros(5, np.int32), 65),
        (np.zeros(150, np.int32), 160),
    ):
        with pytest.raises(RequestTooLarge) as caught:
            cache.admit(SCOPE, token_ids, most_tokens=most)
        needed = -(-max(token_ids.size, most or 0) // PAGE) * PAGE
        assert (caught.value.requested, caught.value.available) == (needed, 64)
    with pytest.raises(ShapeError):
        cache.admit(SCOPE, np.zeros(201, np.int32))
    row = cache.admit(SCOPE, np.arange(64, dtype=np.int32), most_tokens=64).row
    assert cache.admit(SCOPE, np.zeros(5, np.int32)) is None
    cache.release(row, SCOPE, np.zeros(0, np.int32))
    assert cache.admit(SCOPE, np.zeros(5, np.int32), most_tokens=64) is not None


class TestViews:
    """Whatever a class returns can be written without harm, or cannot be written; what it takes it copies."""

    def test_of_the_allocator(self):
        allocator = PagedTokenToKVPoolAllocator(40 * PAGE, PAGE)
        state = allocator.backup_state()
        for taken in (allocator.pages.take([5]), allocator.pages.take_singles(7), allocator.alloc(2 * PAGE)):
            taken[:] = 7
        allocator.pages.free_pages()[:] = 7
        allocator.pages.ref_count(np.arange(40))[:] = 7
        for array in (state.ref_count, state.births, state.free.singles, *state.free.loose):
            assert not array.flags.writeable
        allocator.restore_state(state)
        allocator.check_integrity([])
        assert sorted(allocator.pages.take([40]).tolist()) == list(range(1, 41))

    def test_of_single_pages_that_were_given_back(self):
        allocator = PagedTokenToKVPoolAllocator(40 * PAGE, PAGE)
        pages = allocator.pages.take_singles(9)
        allocator.pages.release(pages)
        state = allocator.backup_state()
        pages[:] = 7
        for part in (state.free.singles, *state.free.loose):
            with pytest.raises(ValueError, match="read-only"):
                part[:] = 7
        allocator.check_integrity([])

    def test_of_rows(self, cache):
        table = cache.page_table
        with pytest.raises(ValueError, match="read-only"):  # the table's own, of which it knows that they are in use
            table.plan_growth(np.array([0, 1]), [3, 4]).rows[:] = 1
        copies = table.rows([0]), table.kv_lens([0]), table.row_pages(0), table.full_pages(0, 9), table.held_pages()
        for array in (*copies, *table.take_new_pages([0]), table.slots(0, 0, 9), table.last_loc([0], [9])):
            array[:] = 1
        cache.check_integrity()
        growth = table.plan_growth([0, 1], [9, 9])
        pages = cache.allocator.pages.take(growth.runs)
        kept = pages.copy()
        table.grow(growth, pages)
        pages[:] = 1
        assert set(kept.tolist()) <= set(table.rows([0, 1]).reshape(-1).tolist())
        cache.check_integrity()

    def test_of_the_prefix_cache(self):
        allocator = PagedTokenToKVPoolAllocator(40 * PAGE, PAGE)
        told = []
        tree = RadixCache(allocator, PAGE, on_evict=told.extend)
        token_ids = np.random.default_rng().integers(0, 99, 5 * PAGE).astype(np.int32)
        for end in (3, 5):  # the second lengthens
            pages = allocator.pages.take([end])
            mine = token_ids[: end * PAGE].copy()
            tree.insert(SCOPE, mine, pages)
            allocator.pages.release(pages)
            pages[:], mine[:] = 7, 7
        found = tree.match(SCOPE, np.append(token_ids, 1))
        assert found.num_tokens == 5 * PAGE
        with pytest.raises(ValueError, match="read-only"):
            found.pages[:] = 7
        tree.pages()[:] = 7
        tree.check_integrity()
        tree.evict(3)
        for part in told:
            assert not part.pages.flags.writeable
            assert not part.token_ids.flags.writeable
        tree.check_integrity()

    def test_of_the_host_tier(self):
        tier = HostTier(4 * FORM.page_bytes, FORM)
        token_ids = np.arange(2 * PAGE, dtype=np.int32)
        data = random_pages(np.random.default_rng(), FORM, 2)
        tier.put(SCOPE, token_ids, 0, data)
        content = data.tobytes()
        data[:], token_ids[:] = 0, 0
        token_ids = np.arange(2 * PAGE)
        tier.get(SCOPE, token_ids, 0)[:] = 0
        for segment in tier.segments():
            segment.data[:] = 0
            assert not segment.token_ids.flags.writeable
        assert tier.get(SCOPE, token_ids, 0).tobytes() == content
