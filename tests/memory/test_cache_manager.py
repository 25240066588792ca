"""The cache manager at its edges: failures half way, resets of pages in use, which rows may be forked."""

import numpy as np
import pytest
from pretend_pool import PretendPool

from engine.errors import ConfigError, DoubleFreeError, KVPoolExhausted, ShapeError
from engine.memory.manager import CacheManager
from engine.memory.offload.host_tier import HostTier
from engine.memory.offload.page_format import PageFormat
from engine.memory.scope import CacheScope, LayoutKey

PAGE, CONTEXT = 4, 64
SCOPE = CacheScope("model", 0, None, "", LayoutKey.of({"version": 1}))
FORMAT = PageFormat(
    1, np.dtype(np.float32), {"page_size": PAGE, "head_num": 1, "head_dim": 1, "dtype": "float32", "version": 1}
)


class Boom(Exception):
    """What an injected fault raises."""


NO_TOKENS = np.empty(0, np.int32)


def make(size=64, rows=3, *, host_pages=0, **options):
    cache = CacheManager(size, PAGE, rows, CONTEXT, **options)
    if host_pages:
        cache.attach_host_tier(HostTier(host_pages * FORMAT.page_bytes, FORMAT))
    return cache, PretendPool(cache, FORMAT.page_shape, np.float32)


def tokens(count, start=0):
    return np.arange(start, start + count, dtype=np.int32)


def compute(cache, token_ids, **options):
    """Admits a request, gives it slots for all of its tokens and publishes them."""
    admission = cache.admit(SCOPE, token_ids, **options)
    have = admission.cached_tokens + admission.loaded_tokens
    cache.grow(np.array([admission.row], np.int32), np.array([len(token_ids) - have], np.int32))
    cache.mark_computed([admission.row], [len(token_ids)])
    cache.publish(admission.row, SCOPE, token_ids)
    return admission


def test_an_admission_whose_host_load_fails_leaves_no_row_and_no_lock(monkeypatch):
    cache, pool = make(host_pages=20)
    first, second = tokens(40), tokens(40, start=100)
    for each in (first, second):  # the second pushes the first out
        cache.release(compute(cache, each).row, SCOPE, each)
        pool.make_moves()

    def fail(*_, **__):
        raise Boom

    with monkeypatch.context() as patched:
        patched.setattr(cache.host_tier, "get", fail)
        with pytest.raises(Boom):
            cache.admit(SCOPE, first)
    cache.check_integrity()
    assert cache.held_tokens == 0
    assert cache.page_table.available_rows == 3
    assert cache.prefix.protected_pages == 0
    queried = cache.prefix.query_tokens
    admission = cache.admit(SCOPE, first)
    assert admission.loaded_tokens > 0
    assert cache.prefix.query_tokens == queried + 40  # the one that failed was not counted


def test_what_comes_back_from_the_host_is_cached_once_the_load_has_run():
    cache, pool = make(host_pages=20)
    first, second = tokens(40), tokens(40, start=100)
    for each in (first, second):
        row = compute(cache, each).row
        pool.make_moves()
        pool.content[cache.page_table.row_pages(row)] = 1.0 + each[::PAGE].reshape(-1, *[1] * len(FORMAT.page_shape))
        cache.release(row, SCOPE, each)
    admission = cache.admit(SCOPE, first)
    loaded = admission.cached_tokens + admission.loaded_tokens
    assert (admission.loaded_tokens > 0, cache.page_table.computed_len(admission.row)) == (
        True,
        admission.cached_tokens,
    )
    cache.publish(admission.row, SCOPE, first)  # nothing yet: the device has not loaded them
    assert cache.locked_pages(admission.row) == admission.cached_tokens // PAGE
    pool.run_step(admission.row, loaded)
    np.testing.assert_array_equal(
        pool.content[cache.page_table.row_pages(admission.row)].reshape(loaded // PAGE, -1)[:, 0],
        1.0 + first[:loaded:PAGE],
    )
    cache.publish(admission.row, SCOPE, first)
    assert cache.locked_pages(admission.row) == loaded // PAGE
    cache.check_integrity()


def test_what_was_granted_and_not_computed_is_not_cached():
    cache, _ = make()
    for ends in (cache.publish, cache.release):
        row = cache.admit(SCOPE, tokens(20)).row
        cache.grow([row], [20 - cache.page_table.kv_len(row)])
        cache.mark_computed([row], [9])
        ends(row, SCOPE, tokens(20))
        assert cache.cached_tokens(SCOPE, tokens(21)) == 8
        cache.check_integrity()
    with pytest.raises(ShapeError, match="cannot have computed 21 tokens: it was granted 20"):
        cache.mark_computed([0], [21])
    with pytest.raises(ShapeError, match="cannot fork 12 tokens of row 0: 9 are computed"):
        cache.fork(0, 12)
    assert not cache.can_fork(0, 12)


def test_equal_rows_that_publish_share_the_pages_of_the_first():
    cache, _ = make(size=128, rows=8)
    rows = [cache.admit(SCOPE, tokens(17)).row for _ in range(4)]
    cache.grow(rows, [17] * 4)
    cache.page_table.take_new_pages(rows)
    cache.mark_computed(rows, [17] * 4)
    child = cache.fork(rows[2], 17)
    for row in rows:
        cache.publish(row, SCOPE, tokens(17))
        cache.check_integrity()
    first = cache.page_table.row_pages(rows[0])
    for row in (*rows[1:], child):
        np.testing.assert_array_equal(cache.page_table.row_pages(row)[:4], first[:4])
        assert cache.locked_pages(row) == 4
    assert np.unique(cache.page_table.held_pages()).size == 4 + 5
    places, pages = cache.page_table.take_new_pages(rows)  # the first still has the pages that the device knows
    assert places.size == 3 * 5
    np.testing.assert_array_equal(pages.reshape(3, 5)[:, :4], np.tile(first[:4], (3, 1)))
    for row in (*rows, child):
        cache.release(row, SCOPE, tokens(17))
        cache.check_integrity()
    assert (cache.held_tokens, cache.prefix.cached_pages) == (0, 4)


def test_a_row_that_waited_shares_what_another_has_computed():
    cache, _ = make(size=128, rows=4)
    leader, follower = (cache.admit(SCOPE, tokens(30)).row for _ in range(2))
    cache.grow([leader], [30])
    assert cache.share(follower, SCOPE, tokens(30)) == 0
    cache.mark_computed([leader], [13])
    cache.publish(leader, SCOPE, tokens(30))
    assert cache.share(follower, SCOPE, tokens(30)) == 12
    cache.mark_computed([leader], [30])
    cache.publish(leader, SCOPE, tokens(30))
    assert cache.share(follower, SCOPE, tokens(30)) == 16  # not the last token's page
    assert cache.page_table.computed_len(follower) == 28 == cache.locked_pages(follower) * PAGE
    cache.grow([follower], [2])
    assert cache.share(follower, SCOPE, tokens(30)) == 0  # it computes the rest itself
    for row in (leader, follower):
        cache.release(row, SCOPE, tokens(30))
        cache.check_integrity()
    assert cache.held_tokens == 0


def test_a_row_shares_only_what_goes_on_from_its_own_pages():
    """Not pages of other tokens, nor those that were computed anew once its scope had been reset."""
    cache, _ = make(size=128, rows=4)
    cache.release(compute(cache, tokens(8)).row, SCOPE, tokens(8))
    follower = cache.admit(SCOPE, tokens(30)).row
    other = compute(cache, tokens(30, start=500)).row
    assert cache.share(follower, SCOPE, tokens(30, start=500)) == 0
    cache.prefix.reset(SCOPE)
    leader = compute(cache, tokens(30)).row
    assert cache.share(follower, SCOPE, tokens(30)) == 0
    assert cache.locked_pages(follower) == 2
    for row in (other, leader):
        cache.release(row, SCOPE, NO_TOKENS)
    cache.grow([follower], [min(cache.reclaimable_pages * PAGE, CONTEXT - 8)])
    cache.check_integrity()


class TestTruncate:
    def test_pages_of_its_own_go_back(self):
        cache, _ = make()
        row = cache.admit(SCOPE, tokens(4)).row
        cache.grow([row], [14])
        cache.page_table.take_new_pages([row])
        free = cache.allocator.available_size()
        cache.truncate(row, 9)
        cache.check_integrity()
        assert (cache.page_table.kv_len(row), cache.allocator.available_size()) == (9, free + PAGE)
        cache.grow([row], [5])
        places, _ = cache.page_table.take_new_pages([row])
        assert places.tolist() == [3]
        assert cache.take_moves() == []

    def test_a_shared_page_is_not_written(self):
        cache, _ = make(size=128)
        row = compute(cache, tokens(20)).row
        before = cache.page_table.row_pages(row)
        cache.truncate(row, 10)
        cache.check_integrity()
        after = cache.page_table.row_pages(row)
        assert after[:2].tolist() == before[:2].tolist()
        assert after[2] not in before
        (copy,) = cache.take_moves()
        assert (copy.sources.tolist(), copy.targets.tolist()) == ([before[2]], [after[2]])
        assert cache.page_table.computed_len(row) == 10
        cache.grow([row], [6])
        cache.mark_computed([row], [16])
        other = np.concatenate([tokens(10), tokens(20, start=500)])
        cache.publish(row, SCOPE, other)
        cache.release(row, SCOPE, other)
        cache.check_integrity()
        assert cache.held_tokens == 0
        assert cache.cached_tokens(SCOPE, tokens(21)) == 20
        assert cache.cached_tokens(SCOPE, other) in (8, 16)

    def test_to_a_page_boundary_or_to_nothing_copies_nothing(self):
        cache, _ = make()
        row = compute(cache, tokens(20)).row
        for length in (8, 0, 0):
            cache.truncate(row, length)
            cache.check_integrity()
            assert cache.page_table.kv_len(row) == length
        assert cache.take_moves() == []
        cache.release(row, SCOPE, tokens(20))
        assert cache.held_tokens == 0

    def test_what_it_has_not_is_refused(self):
        cache, _ = make()
        row = compute(cache, tokens(5)).row
        for length in (6, -1, 1.5):
            with pytest.raises(ShapeError):
                cache.truncate(row, length)
        cache.truncate(row, 5)
        assert cache.page_table.kv_len(row) == 5

    def test_what_it_gives_back_is_not_locked_any_more(self):
        cache, _ = make()
        row = compute(cache, tokens(20)).row
        cache.truncate(row, 10)
        assert (cache.locked_pages(row), cache.prefix.protected_pages, cache.prefix.evictable_pages) == (2, 2, 3)
        cache.reset_prefix_cache()
        cache.truncate(row, 5)  # in a tree that is not found any more
        assert (cache.locked_pages(row), cache.prefix.protected_pages) == (1, 1)
        cache.release(row, SCOPE, tokens(20))
        cache.check_integrity()
        assert cache.held_tokens == 0

    @pytest.mark.parametrize("how", ["truncate", "fork"])
    def test_a_page_that_another_row_shares_is_locked_once_it_is_cached(self, how):
        """Also where the row that has it cached left a cached sequence before."""
        cache, _ = make(rows=4)
        row = compute(cache, tokens(16)).row
        if how == "fork":
            row, first = cache.fork(row, 7), row
            cache.release(first, SCOPE, tokens(16))
        else:
            cache.truncate(row, 7)
        cache.grow([row], [9])
        cache.mark_computed([row], [16])
        other = np.concatenate([tokens(7), tokens(9, start=500)])
        child = cache.fork(row, 12)
        cache.publish(row, SCOPE, other)
        cache.release(row, SCOPE, other)
        assert cache.locked_pages(child) == 3
        cache.grow([child], [cache.reclaimable_pages * PAGE])
        cache.check_integrity()

    def test_without_a_page_for_the_copy_nothing_changes(self):
        cache, _ = make(size=32)
        row = compute(cache, tokens(32)).row
        with pytest.raises(KVPoolExhausted):
            cache.truncate(row, 30)
        assert cache.page_table.kv_len(row) == 32
        cache.check_integrity()


def test_to_find_no_room_costs_no_look_at_what_is_cached(monkeypatch):
    cache, _ = make()
    row = compute(cache, tokens(40)).row
    monkeypatch.setattr(cache.prefix, "pages", None)
    assert cache.admit(SCOPE, tokens(40)[:20].repeat(2)) is None
    assert cache.admit(SCOPE, np.append(tokens(8), tokens(32, start=90))) is None
    assert cache.locked_pages(row) == cache.prefix.protected_pages == 10


def test_without_a_row_no_request_is_admitted_and_nothing_stays_locked():
    cache, _ = make(size=128, rows=1)
    held = compute(cache, tokens(8))
    protected = cache.prefix.protected_pages
    assert cache.admit(SCOPE, tokens(8)) is None
    assert cache.prefix.protected_pages == protected
    cache.release(held.row, SCOPE, tokens(8))
    assert cache.held_tokens == 0


def test_what_was_computed_before_a_reset_is_not_cached_after_it():
    cache, _ = make()
    token_ids = tokens(24)
    row = compute(cache, token_ids[:12]).row
    fork = cache.fork(row, 10)
    cache.reset_prefix_cache()
    for each, count in ((row, 12), (fork, 14)):
        cache.grow(np.array([each], np.int32), np.array([count], np.int32))
        cache.mark_computed([each], [24])
        cache.publish(each, SCOPE, token_ids)
        cache.check_integrity()
    for each in (row, fork):
        cache.release(each, SCOPE, token_ids)
        cache.check_integrity()
    assert cache.held_tokens == 0
    again = compute(cache, token_ids)  # the row is one of those from before, its next owner's pages are cached
    assert again.cached_tokens == 0
    assert compute(cache, token_ids).cached_tokens == 20


def test_a_fork_after_a_reset_shares_pages_that_are_no_longer_cached():
    cache, _ = make(policy="lru")
    row = compute(cache, tokens(10)).row
    cache.reset_prefix_cache()
    child = cache.fork(row, 9)
    (copy,) = cache.take_moves()
    assert (copy.sources.size, copy.targets.size) == (1, 1)
    cache.check_integrity()
    cache.release(row, SCOPE, tokens(10))
    assert cache.held_tokens == 3 * PAGE  # by the child
    cache.release(child, SCOPE, tokens(9))
    cache.check_integrity()
    assert cache.held_tokens == 0


@pytest.mark.parametrize("broken", ["grow", "lock"])
def test_a_fork_that_fails_half_way_leaves_nothing(monkeypatch, broken):
    cache, _ = make(policy="lru")
    row = compute(cache, tokens(10)).row
    before = cache.page_table.available_rows, cache.allocator.pages.available, cache.prefix.protected_pages

    def fail(*_):
        raise Boom

    with monkeypatch.context() as patched:
        patched.setattr(cache if broken == "grow" else cache.prefix, broken, fail)
        with pytest.raises(Boom):
            cache.fork(row, 9)
    assert (cache.page_table.available_rows, cache.allocator.pages.available, cache.prefix.protected_pages) == before
    cache.check_integrity()
    cache.release(row, SCOPE, tokens(10))
    assert cache.held_tokens == 0


def test_a_return_of_the_same_request_is_no_query():
    cache, _ = make()
    token_ids = tokens(12)
    cache.release(compute(cache, token_ids).row, SCOPE, token_ids)
    assert compute(cache, token_ids, counts_hit=False).cached_tokens == 8
    assert (cache.prefix.query_tokens, cache.prefix.hit_tokens) == (12, 0)


def test_the_priority_of_a_request_is_that_of_its_cached_pages():
    cache, _ = make(policy="priority")
    important, other = tokens(20), tokens(20, start=100)
    cache.release(compute(cache, important, priority=2).row, SCOPE, important)
    cache.release(compute(cache, other, priority=1).row, SCOPE, other)
    cache.prefix.evict(5)  # the older pages are those of the important one
    assert cache.prefix.match(SCOPE, np.append(important, 0)).num_tokens == 20
    assert cache.prefix.match(SCOPE, np.append(other, 0)).num_tokens == 0


def test_a_fork_leaves_alone_what_others_were_promised():
    cache, _ = make(size=32)
    parent = compute(cache, tokens(10)).row  # three pages of eight
    assert cache.can_fork(parent, 9)
    cache.admit(SCOPE, tokens(15, start=100))  # promised four, and soon full: one is left for the fork
    assert cache.can_fork(parent, 9)
    cache.admit(SCOPE, tokens(1, start=200))
    assert not cache.can_fork(parent, 9)
    cache.release(parent, SCOPE, tokens(0))
    cache.check_integrity()


@pytest.mark.parametrize(("most", "admitted"), [(16, True), (17, False)])
def test_no_page_is_reserved_for_a_request_that_will_never_need_one(most, admitted):
    cache, _ = make(size=32)
    compute(cache, tokens(16), most_tokens=most)  # four full pages of eight
    # Fifteen tokens and the next one: the other four, or one too many.
    assert (cache.admit(SCOPE, tokens(15, start=100)) is not None) == admitted


def test_admission_leaves_every_running_request_the_pages_of_its_next_steps():
    """With pages of 16, two steps: every running request can grow by that before the pool is short."""
    rng = np.random.default_rng()
    for _ in range(200):
        cache = CacheManager(16 * int(rng.integers(4, 12)), 16, 4, 192)
        rows, lens = [], []
        for number in range(4):
            length = int(rng.integers(1, 60))
            admission = cache.admit(SCOPE, tokens(length, start=1000 * number))
            if admission is not None:
                rows.append(admission.row)
                lens.append(length)
        index = np.array(rows, np.int32)
        cache.grow(index, np.array(lens, np.int64))
        cache.grow(index, np.full(len(rows), 2, np.int64))
        cache.check_integrity()


@pytest.mark.parametrize("policy", ["lru", "lfu", "priority"])
def test_an_advance_is_an_insert_a_lock_and_an_unlock(policy):
    """Two caches of equal history; few token values, so that much is known already and some ends inside a node."""
    rng = np.random.default_rng()
    ours, plain = (make(size=512, policy=policy)[0].prefix for _ in range(2))
    handles = [cache.match(SCOPE, tokens(0)) for cache in (ours, plain)]
    ours.lock(handles[0])
    plain.lock(handles[1])
    for _ in range(40):
        sequence = rng.integers(0, 2, int(rng.integers(0, 12))).repeat(PAGE).astype(np.int32)
        priority = int(rng.integers(3))
        pages = []
        for cache in (ours, plain):
            cache.evict(max(0, 12 - cache.allocator.available_size() // PAGE))
            pages.append(cache.allocator.alloc(sequence.size)[::PAGE] // PAGE)
        old, handles = handles, [ours.advance(handles[0], SCOPE, sequence, pages[0], priority=priority)]
        plain.insert(SCOPE, sequence, pages[1], priority=priority)
        handles.append(plain.match(SCOPE, np.append(sequence, np.int32(0))))
        plain.lock(handles[1])
        plain.unlock(old[1])
        for cache, mine in ((ours, pages[0]), (plain, pages[1])):
            cache.allocator.pages.release(mine)
            cache.check_integrity()
        assert handles[0].num_tokens == handles[1].num_tokens == sequence.size
        assert handles[0].pages.tolist() == handles[1].pages.tolist()
        assert (ours.protected_pages, ours.evictable_pages) == (plain.protected_pages, plain.evictable_pages)
        assert old[0].locks == 0


def test_an_advance_under_replaced_weights_keeps_what_was_locked():
    cache = make()[0].prefix
    pages = cache.allocator.alloc(8)[::PAGE] // PAGE
    cache.insert(SCOPE, tokens(8), pages)
    handle = cache.match(SCOPE, tokens(9))
    with pytest.raises(DoubleFreeError, match="holds no lock"):
        cache.advance(handle, SCOPE, tokens(8), pages)
    cache.lock(handle)
    cache.raise_weights_epoch("model", 1)
    assert cache.advance(handle, SCOPE, tokens(8), pages) is handle
    assert cache.protected_pages == 2
    cache.unlock(handle)


def harm_page_table(cache):
    cache.page_table._granted[0] += 9
    cache.page_table._free_rows.extend([0, 1])


def harm_allocator(cache):
    cache.allocator.pages.release(cache.prefix.pages()[:1])
    cache.allocator.pages._free.put(np.array([5, 5], np.int32))


def harm_prefix(cache):
    node = next(iter(cache.prefix._forest.trees())).root.children.popitem()[1]
    node.locks += 3
    cache.prefix._forest.evictable -= 7


def harm_locks(cache):
    cache._leases.popitem()
    cache.page_table._known[:] = 40


@pytest.mark.parametrize("harm", [lambda cache: None, harm_page_table, harm_allocator, harm_prefix, harm_locks])
def test_a_cleared_manager_is_empty_whatever_state_its_books_were_in(harm):
    cache, _ = make(host_pages=4)
    compute(cache, tokens(13))
    row = compute(cache, tokens(17)).row
    parts = cache.page_table, cache.allocator, cache.prefix, cache.host_tier
    growth, held = cache.page_table.plan_growth([row], 1), cache.prefix.match(SCOPE, tokens(9))
    slots, hits = cache.allocator.alloc(PAGE), cache.prefix.hit_tokens
    cache.prefix.lock(held)
    cache.prefix.evict(1)
    harm(cache)
    cache.clear()
    cache.check_integrity()
    assert parts == (cache.page_table, cache.allocator, cache.prefix, cache.host_tier)
    assert cache.allocator.available_size() == cache.size == cache.reclaimable_pages * PAGE
    assert cache.page_table.available_rows == 3
    assert cache.cached_tokens(SCOPE, tokens(13)) == 0
    assert hits == cache.prefix.hit_tokens > 0
    with pytest.raises(DoubleFreeError):
        cache.prefix.unlock(held)
    with pytest.raises(DoubleFreeError):
        cache.prefix.lock(held)
    rows = [compute(cache, tokens(cache.size // 4, 50 * n)).row for n in range(3)]
    with pytest.raises(ShapeError):
        cache.page_table.grow(growth, np.empty(0, np.int32))
    taken = cache.allocator.pages.take(np.array([cache.allocator.pages.available]))
    with pytest.raises(DoubleFreeError):
        cache.allocator.free(slots)
    cache.allocator.pages.release(taken)
    for row in rows:
        cache.release(row, SCOPE, tokens(0))
    cache.check_integrity()


def test_a_cleared_manager_keeps_a_sound_host_tier_and_empties_a_broken_one():
    cache, pool = make(host_pages=4)
    row = compute(cache, tokens(13)).row
    cache.release(row, SCOPE, tokens(13))
    cache.prefix.evict(2)
    pool.make_moves()
    tier = cache.host_tier
    cache.clear()
    assert tier.held_pages == 2
    tier._free_rows.append(0)
    cache.clear()
    assert tier.held_pages == 0
    tier.check_integrity()


@pytest.mark.parametrize("ends", ["publish", "release"])
@pytest.mark.parametrize("shared", [8, 16, 18])
def test_a_row_that_shares_pages_that_become_cached_keeps_them_locked(ends, shared):
    """A row is forked before it is published: room is counted as it is."""
    cache, _ = make(64, rows=4)
    row = cache.admit(SCOPE, tokens(20)).row
    cache.grow([row], [20])
    cache.mark_computed([row], [20])
    child = cache.fork(row, shared)
    if ends == "publish":
        cache.publish(row, SCOPE, tokens(20))
    cache.release(row, SCOPE, tokens(20))
    assert cache.locked_pages(child) == shared // PAGE
    held = cache.page_table.row_pages(child).size
    assert cache.reclaimable_pages == 64 // PAGE - held
    assert cache.has_room_to_grow([child], [64 - held * PAGE])
    cache.grow([child], [64 - held * PAGE])
    cache.check_integrity()
    cache.release(child, SCOPE, tokens(shared))
    cache.check_integrity()
    assert cache.reclaimable_pages == 64 // PAGE
    assert cache.cached_tokens(SCOPE, tokens(shared + 1)) == shared // PAGE * PAGE


def test_several_forks_of_an_unpublished_row_each_keep_what_they_share():
    cache, _ = make(128, rows=6)
    row = cache.admit(SCOPE, tokens(24)).row
    cache.grow([row], [24])
    cache.mark_computed([row], [24])
    children = {cache.fork(row, shared): shared for shared in (4, 12, 24, 10)}
    grandchild = cache.fork(list(children)[1], 8)
    cache.publish(row, SCOPE, tokens(21))
    for child, shared in {**children, grandchild: 8}.items():
        assert cache.locked_pages(child) == min(shared, 20) // PAGE
    cache.release(row, SCOPE, tokens(24))
    for child, shared in {**children, grandchild: 8}.items():
        held = np.unique(cache.page_table.held_pages())
        private = np.count_nonzero(~cache.prefix.is_cached(held))
        assert cache.prefix.protected_pages + private + cache.reclaimable_pages == 128 // PAGE
        cache.prefix.evict(cache.prefix.evictable_pages)
        assert cache.allocator.pages.available == cache.reclaimable_pages
        cache.release(child, SCOPE, tokens(shared))
        cache.check_integrity()


@pytest.mark.parametrize("what", ["tokens", "scope", "prefix"])
def test_a_release_that_raises_gives_all_back_once(what):
    cache, _ = make()
    rows = [compute(cache, tokens(13)).row, compute(cache, tokens(20, 50)).row]
    if what == "prefix":
        cache.prefix.finish = lambda *_, **__: (_ for _ in ()).throw(Boom())
    arguments = {"tokens": (SCOPE, [1.5]), "scope": ("scope", tokens(20, 50)), "prefix": (SCOPE, tokens(20, 50))}
    with pytest.raises((Boom, ShapeError, ConfigError)):
        cache.release(rows[1], *arguments[what])
    cache.check_integrity()
    assert cache.page_table.rows_in_use().tolist() == rows[:1]
    assert cache.reclaimable_pages == 64 // PAGE - 4
    with pytest.raises(DoubleFreeError):
        cache.release(rows[1], SCOPE, tokens(20, 50))
    cache.check_integrity()
