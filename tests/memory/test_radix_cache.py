"""The prefix cache's contract: what each call returns, refuses, and leaves alone."""

import numpy as np
import pytest

from engine.errors import ConfigError, DoubleFreeError, IntegrityError, ShapeError
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator
from engine.memory.prefix.cache import RadixCache
from engine.memory.scope import Adapter, CacheScope, LayoutKey

PAGE, PAGES = 4, 32
LAYOUT = LayoutKey.of({"page_size": PAGE})
SCOPE = CacheScope("model", 0, None, "", LAYOUT)


@pytest.fixture
def allocator():
    return PagedTokenToKVPoolAllocator(PAGES * PAGE, PAGE)


@pytest.fixture
def cache(allocator):
    return RadixCache(allocator, PAGE)


@pytest.fixture
def tokens():
    return np.random.default_rng().integers(-(2**31), 2**31, 8 * PAGE).astype(np.int32)


def take(allocator, count):
    return allocator.alloc(count * PAGE)[::PAGE] // PAGE


def insert(cache, tokens, scope=SCOPE):
    """Inserts a sequence as a request would that computed all of it, and returns its pages."""
    pages = take(cache.allocator, len(tokens) // PAGE)
    cache.insert(scope, tokens, pages)
    cache.allocator.pages.release(pages)
    return pages


def state(cache):
    """All that a refused call must leave as it was."""
    nodes = [
        (tree.scope, node.start, node.pages.tolist(), node.locks, node.level, node.stamp)
        for tree in cache._forest.trees()
        for node in tree.nodes()
    ]
    counters = (cache.evictable_pages, cache.protected_pages, cache.query_tokens, cache.hit_tokens, cache.evicted_pages)
    return nodes, counters, cache.allocator.pages.ref_count(np.arange(PAGES + 1)).tolist()


def test_a_whole_match_finds_every_page(cache, tokens):
    pages = insert(cache, tokens)
    for length in range(len(tokens) + 1):
        match = cache.match(SCOPE, tokens[:length], whole=True)
        assert match.num_tokens == length // PAGE * PAGE
        assert match.pages.tolist() == pages[: length // PAGE].tolist()
    assert cache.match(SCOPE, np.append(tokens, tokens), whole=True).num_tokens == len(tokens)


def test_a_match_leaves_one_token_to_compute(cache, tokens):
    pages = insert(cache, tokens)
    for length in range(len(tokens) + 1):
        match = cache.match(SCOPE, tokens[:length])
        assert match.num_tokens == max(length - 1, 0) // PAGE * PAGE
        assert match.pages.tolist() == pages[: match.num_tokens // PAGE].tolist()
        assert match.pages.dtype == np.int32


def test_only_full_pages_enter(cache, tokens):
    pages = take(cache.allocator, 2)
    assert cache.insert(SCOPE, tokens[: 2 * PAGE + 3], pages) == 0
    assert cache.cached_pages == 2
    assert cache.match(SCOPE, tokens).num_tokens == 2 * PAGE


def test_duplicates_stay_the_callers(cache, allocator, tokens):
    first = insert(cache, tokens[: 4 * PAGE])
    mine = take(allocator, 6)
    assert cache.insert(SCOPE, tokens[: 6 * PAGE], mine) == 4 * PAGE
    assert allocator.pages.ref_count(mine).tolist() == [1, 1, 1, 1, 2, 2]
    allocator.pages.release(mine)
    assert allocator.pages.ref_count(mine).tolist() == [0, 0, 0, 0, 1, 1]
    assert cache.match(SCOPE, tokens).pages.tolist() == [*first, *mine[4:]]
    cache.check_integrity()


def test_the_cache_keeps_no_array_of_the_callers(cache, tokens):
    asked, pages = tokens.copy(), take(cache.allocator, 8)
    wanted = pages.tolist()
    cache.insert(SCOPE, asked, pages)
    asked[:], pages[:] = 0, 1
    match = cache.match(SCOPE, np.append(tokens, 0))
    assert match.pages.tolist() == wanted
    with pytest.raises(ValueError, match="read-only"):
        match.pages[0] = 1


def test_any_integers_serve_as_tokens(cache, tokens):
    insert(cache, tokens)
    for other in (tokens.tolist(), tokens.astype(np.int64), np.repeat(tokens, 2)[::2]):
        assert cache.match(SCOPE, other).num_tokens == 7 * PAGE


@pytest.mark.parametrize(
    "other",
    [
        CacheScope("other", 0, None, "", LAYOUT),
        CacheScope("model", 1, None, "", LAYOUT),
        CacheScope("model", 0, Adapter(""), "", LAYOUT),
        CacheScope("model", 0, None, "tenant", LAYOUT),
        CacheScope("model", 0, None, "", LayoutKey.of({"page_size": PAGE, "dtype": "bfloat16"})),
    ],
)
def test_no_two_scopes_share_a_page(cache, allocator, tokens, other):
    pages = insert(cache, tokens)
    assert cache.match(other, tokens).num_tokens == 0
    allocator.pages.retain(pages)
    with pytest.raises(ShapeError, match="another scope"):
        cache.insert(other, tokens, pages)
    allocator.pages.release(pages)
    theirs = insert(cache, tokens, other)
    assert set(theirs.tolist()).isdisjoint(pages.tolist())
    assert cache.match(SCOPE, tokens).pages.tolist() == pages[:7].tolist()
    cache.reset(other)
    assert cache.match(SCOPE, tokens).pages.tolist() == pages[:7].tolist()
    cache.check_integrity()


def test_tokens_are_compared_not_just_hashed(cache, tokens):
    insert(cache, tokens)
    for at in range(len(tokens)):
        changed = tokens.copy()
        changed[at] ^= 1
        assert cache.match(SCOPE, np.append(changed, 0)).num_tokens == at // PAGE * PAGE


def test_hits_are_counted_when_recorded_and_never_before(cache, tokens):
    insert(cache, tokens)
    match = cache.match(SCOPE, tokens)
    cache.lock(match)
    assert (cache.query_tokens, cache.hit_tokens) == (0, 0)
    cache.record(match)
    cache.record(cache.match(SCOPE, [1, 2, 3]))
    assert (cache.query_tokens, cache.hit_tokens) == (len(tokens) + 3, 7 * PAGE)


def test_a_lock_protects_the_matched_pages_and_no_more(cache, allocator, tokens):
    pages = insert(cache, tokens)
    match = cache.match(SCOPE, tokens[: 3 * PAGE + 1])
    cache.lock(match)
    assert (cache.protected_pages, cache.evictable_pages) == (3, 5)
    assert cache.evict(100) == 5
    assert allocator.pages.ref_count(pages).tolist() == [1] * 3 + [0] * 5
    assert cache.evict(1) == 0
    cache.unlock(match)
    assert cache.evict(100) == 3
    assert allocator.pages.available == PAGES
    cache.check_integrity()


def test_locks_and_handles_survive_splits(cache, tokens):
    insert(cache, tokens)
    deep, shallow = (cache.match(SCOPE, np.append(tokens[: end * PAGE], 0)) for end in (7, 3))
    cache.lock(deep)
    for end in (5, 2, 1):
        fork = tokens.copy()
        fork[end * PAGE] ^= 1
        insert(cache, fork[: (end + 1) * PAGE])
        cache.check_integrity()
    cache.lock(shallow)
    cache.unlock(deep)
    cache.check_integrity()
    assert cache.protected_pages == 3
    cache.evict(100)
    assert cache.match(SCOPE, tokens).pages.tolist() == shallow.pages.tolist()


def test_a_handle_counts_its_own_locks(cache, tokens):
    insert(cache, tokens)
    one, other = cache.match(SCOPE, tokens), cache.match(SCOPE, tokens)
    cache.lock(one)
    cache.lock(one)
    with pytest.raises(DoubleFreeError, match="holds no lock"):
        cache.unlock(other)
    cache.unlock(one)
    assert cache.protected_pages == 7
    cache.unlock(one)
    before = state(cache)
    with pytest.raises(DoubleFreeError, match="holds no lock"):
        cache.unlock(one)
    assert state(cache) == before
    assert cache.protected_pages == 0


@pytest.mark.parametrize(
    "lose",
    [
        lambda cache: cache.evict(3),
        lambda cache: cache.evict(100),
        lambda cache: cache.reset(),
        lambda cache: cache.reset(SCOPE),
        lambda cache: cache.raise_weights_epoch("model", 1),
    ],
    ids=["trimmed", "evicted", "reset", "reset scope", "new weights"],
)
def test_a_match_that_lost_pages_is_refused(cache, tokens, lose):
    insert(cache, tokens)
    match = cache.match(SCOPE, tokens)
    lose(cache)
    for again in (False, True):
        if again:
            insert(cache, tokens)  # the same tokens, on other pages
        before = state(cache)
        for call in (cache.lock, cache.record):
            with pytest.raises(DoubleFreeError, match="evicted or invalidated"):
                call(match)
        assert state(cache) == before


def test_a_match_of_another_cache_is_refused(cache, allocator, tokens):
    other = RadixCache(allocator, PAGE)
    insert(other, tokens)
    match = other.match(SCOPE, tokens)
    with pytest.raises(DoubleFreeError, match="another cache"):
        cache.lock(match)
    other.lock(match)
    with pytest.raises(DoubleFreeError, match="this cache"):
        cache.unlock(match)
    assert other.protected_pages == 7


def test_an_empty_match_can_be_locked_recorded_and_unlocked(cache, tokens):
    for _ in range(2):  # without a tree, and at its root
        match = cache.match(SCOPE, [1, 2, 3, 4, 5])
        cache.lock(match)
        cache.record(match)
        cache.reset()
        cache.unlock(match)
        insert(cache, tokens)
    cache.check_integrity()


def test_reset_hides_everything_and_frees_what_is_not_locked(cache, allocator, tokens):
    insert(cache, tokens)
    match = cache.match(SCOPE, tokens[: 2 * PAGE + 1])
    cache.lock(match)
    assert cache.reset() == 6
    assert (cache.cached_pages, cache.protected_pages) == (2, 2)
    assert cache.match(SCOPE, tokens).num_tokens == 0
    fresh = insert(cache, tokens)
    cache.unlock(match)
    assert cache.evict(2) == 2
    assert cache.match(SCOPE, tokens).pages.tolist() == fresh[:7].tolist()
    assert allocator.pages.available == PAGES - 8
    assert cache.reset() == 8
    cache.check_integrity()


def test_what_old_weights_computed_is_not_cached_any_more(cache, allocator, tokens):
    cache.raise_weights_epoch("model", 2)
    pages = take(allocator, 8)
    assert cache.insert(SCOPE, tokens, pages) == 0
    assert (cache.cached_pages, allocator.pages.ref_count(pages).max()) == (0, 1)
    with pytest.raises(ConfigError, match="from 2 to 1"):
        cache.raise_weights_epoch("model", 1)


def test_evicted_pages_are_shown_before_they_are_released(allocator, tokens):
    shown = []

    def look(runs):
        shown.extend((run, allocator.pages.ref_count(run.pages).tolist()) for run in runs)

    cache = RadixCache(allocator, PAGE, on_evict=look)
    pages = insert(cache, tokens)
    cache.evict(3)
    ((run, counts),) = shown
    assert run.scope == SCOPE
    assert (run.first_page, run.pages.tolist(), counts) == (5, pages[5:].tolist(), [1, 1, 1])
    assert run.token_ids.tolist() == tokens.tolist()


def test_an_error_in_on_evict_leaks_nothing(allocator, tokens):
    def fail(runs):
        raise OSError("disk full")

    cache = RadixCache(allocator, PAGE, on_evict=fail)
    insert(cache, tokens)
    with pytest.raises(OSError, match="disk full"):
        cache.evict(3)
    assert (cache.cached_pages, allocator.pages.available) == (5, PAGES - 5)
    cache.check_integrity()


@pytest.mark.parametrize(
    ("error", "pattern", "change"),
    [
        (ConfigError, "CacheScope", {"scope": ("model", 0)}),
        (ShapeError, "7 pages of 4 for 32 tokens", {"pages": lambda pages: pages[:7]}),
        (ShapeError, "4 pages of 4", {"pages": lambda pages: pages.reshape(2, 4)}),
        (ShapeError, "integers", {"pages": lambda pages: pages * 1.0}),
        (ShapeError, "listed twice", {"pages": lambda pages: pages[[0, 1, 2, 3, 4, 5, 6, 4]]}),
        (ShapeError, "page 0", {"pages": lambda pages: pages * [1, 1, 1, 1, 1, 1, 1, 0]}),
        (ShapeError, "page -1", {"pages": lambda pages: np.append(pages[:7], -1)}),
        (ShapeError, "page 33", {"pages": lambda pages: np.append(pages[:7], PAGES + 1)}),
        (ShapeError, "page 4294967297", {"pages": lambda pages: np.append(pages[:7].astype(np.int64), 2**32 + 1)}),
        (ShapeError, "has no holder", {"pages": lambda pages: np.append(pages[:7], 31)}),
        (ShapeError, "beyond int32", {"tokens": lambda tokens: tokens.astype(np.int64) + 2**32}),
        (ShapeError, "one axis", {"tokens": lambda tokens: tokens[None]}),
        (ShapeError, "integers", {"tokens": lambda tokens: tokens * 0.5}),
    ],
)
def test_a_refused_insert_changes_nothing(cache, allocator, tokens, error, pattern, change):
    insert(cache, tokens[: 2 * PAGE])
    fork = np.append(tokens[:PAGE], tokens[PAGE:] ^ 1).astype(np.int32)
    pages = take(allocator, 8)
    before = state(cache)
    with pytest.raises(error, match=pattern):
        cache.insert(
            change.get("scope", SCOPE),
            change.get("tokens", lambda same: same)(fork),
            change.get("pages", lambda same: same)(pages),
        )
    assert state(cache) == before
    cache.check_integrity()


def test_a_page_is_cached_in_one_place(cache, allocator, tokens):
    pages = take(allocator, 8)
    cache.insert(SCOPE, tokens, pages)
    before = state(cache)
    with pytest.raises(ShapeError, match=f"page {pages[0]}: it is cached already"):
        cache.insert(SCOPE, tokens ^ 1, pages)
    assert state(cache) == before


@pytest.mark.parametrize("count", [-1, 1.0, True, None])
def test_a_count_that_is_no_count_is_refused(cache, tokens, count):
    insert(cache, tokens)
    before = state(cache)
    with pytest.raises(ShapeError, match="cannot evict"):
        cache.evict(count)
    assert state(cache) == before


def test_options_are_checked(allocator):
    with pytest.raises(ConfigError, match="page_size is 8 tokens here and 4"):
        RadixCache(allocator, 8)
    with pytest.raises(ConfigError, match="'fifo' is unknown"):
        RadixCache(allocator, PAGE, policy="fifo")


def test_scopes_that_come_and_go_leave_nothing_behind(cache, tokens):
    for number in range(50):
        scope = CacheScope(f"model {number}", number, None, str(number), LAYOUT)
        insert(cache, tokens, scope)
        cache.evict(8) if number % 2 else cache.reset(scope)
    forest = cache._forest
    assert not any((forest._trees, forest._orders, forest._tree_counts, forest._dropped))


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache, node: cache.allocator.pages.release(node.pages[:1]),
        lambda cache, node: setattr(node, "pages", node.pages[::-1][[0, 0, 1, 2, 3, 4, 5, 6]]),
        lambda cache, node: node.tree.order.remove(node),
        lambda cache, node: setattr(cache._forest, "evictable", 7),
        lambda cache, node: setattr(node, "locks", 1),
    ],
    ids=["released behind its back", "page twice", "not in the order", "counter", "lock"],
)
def test_damage_is_found(cache, tokens, damage):
    insert(cache, tokens)
    cache.check_integrity()
    (tree,) = cache._forest.trees()
    (node,) = tree.nodes()
    damage(cache, node)
    with pytest.raises(IntegrityError):
        cache.check_integrity()
