"""``advance`` and ``finish`` against the calls that they stand for, on two caches of equal history."""

import numpy as np
import pytest

from engine.errors import DoubleFreeError
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator
from engine.memory.prefix.cache import RadixCache
from engine.memory.scope import CacheScope, LayoutKey

PAGE, PAGES = 2, 256
POLICIES = ["lru", "lfu", "priority"]
SCOPES = [CacheScope("model", 0, None, salt, LayoutKey.of({"page_size": PAGE})) for salt in ("", "salt")]


class Player:
    """Requests on one cache, through the calls that are tested or through the plain ones."""

    def __init__(self, policy, is_plain):
        self.cache = RadixCache(
            PagedTokenToKVPoolAllocator(PAGES * PAGE, PAGE), PAGE, policy=policy, on_evict=self.note
        )
        self.is_plain = is_plain
        self.evicted = []

    def note(self, evicted):
        for run in evicted:
            ends = run.first_page + np.arange(len(run.pages), 0, -1)  # the last page of a sequence goes first
            self.evicted += [(run.scope.tenant_salt, tuple(run.token_ids[: end * PAGE].tolist())) for end in ends]

    def begin(self, scope, tokens):
        match = self.cache.match(scope, tokens)
        self.cache.lock(match)
        self.cache.record(match)
        return match

    def grow(self, match, scope, tokens, priority, ends):
        self.cache.evict(max(0, tokens.size // PAGE - self.cache.allocator.pages.available))
        pages = self.cache.allocator.alloc(tokens.size)[::PAGE] // PAGE
        if not self.is_plain:
            call = self.cache.finish if ends else self.cache.advance
            held = call(match, scope, tokens, pages, priority=priority)
        else:
            self.cache.insert(scope, tokens, pages, priority=priority)
            held = None
            if not ends:
                held = self.cache.match(scope, np.append(tokens, np.int32(0)))
                self.cache.lock(held)
            self.cache.unlock(match)
        self.cache.allocator.pages.release(pages)
        return held


def drawn_tokens(rng, pages):
    """Few values and mostly one, so that much is known already and some ends inside a node."""
    return (rng.random(pages) < 0.15).repeat(PAGE).astype(np.int32)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attempt", range(6))
def test_requests_that_grow_leave_what_the_plain_calls_leave(policy, attempt):
    seed = np.random.SeedSequence().entropy  # not of the test's name: every process must collect the same names
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    players = [Player(policy, is_plain) for is_plain in (False, True)]
    running = []  # [scope, tokens, priority, handles]
    for _ in range(120):
        if len(running) < 4 and rng.random() < 0.5:
            scope, tokens = SCOPES[rng.integers(2)], drawn_tokens(rng, rng.integers(0, 8))
            handles = [player.begin(scope, tokens) for player in players]
            running.append([scope, tokens, int(rng.integers(-1, 2)), handles])
        elif running:
            at, ends = int(rng.integers(len(running))), bool(rng.random() < 0.3)
            scope, tokens, priority, handles = running[at]
            tokens = np.append(tokens, drawn_tokens(rng, rng.integers(0, 4)))
            handles = [
                player.grow(each, scope, tokens, priority, ends) for player, each in zip(players, handles, strict=True)
            ]
            if ends:
                del running[at]
            else:
                assert handles[0].num_tokens == handles[1].num_tokens == tokens.size
                assert handles[0].pages.tolist() == handles[1].pages.tolist()
                assert not handles[0].pages.flags.writeable
                running[at] = [scope, tokens, priority, handles]
        ours, plain = (player.cache for player in players)
        ours.check_integrity()
        assert (ours.protected_pages, ours.evictable_pages) == (plain.protected_pages, plain.evictable_pages)
    for *_, handles in running:
        for player, handle in zip(players, handles, strict=True):
            player.cache.unlock(handle)
    for player in players:
        while player.cache.evict(1):
            pass
    assert players[0].evicted == players[1].evicted


@pytest.mark.parametrize("policy", ["lfu", "priority"])
def test_what_grows_from_a_favoured_beginning_is_not_favoured_itself(policy):
    """A beginning that was hit, or asked for with priority, lies in a node of a higher level."""
    player = Player(policy, is_plain=False)
    first, longer, other = (np.arange(size * PAGE, dtype=np.int32) + start for size, start in [(2, 0), (3, 0), (1, 50)])
    player.grow(player.begin(SCOPES[0], other), SCOPES[0], other, 1, ends=True)
    player.grow(player.begin(SCOPES[0], first), SCOPES[0], first, 2, ends=True)
    for tokens in (other, first, first):
        player.cache.unlock(player.begin(SCOPES[0], np.append(tokens, 0)))
    player.grow(player.begin(SCOPES[0], longer), SCOPES[0], longer, 0, ends=True)
    for _ in range(4):
        player.cache.evict(1)
    assert [len(tokens) // PAGE for _, tokens in player.evicted] == [3, 1, 2, 1]
    assert player.evicted[1][1] == tuple(other.tolist())


def test_a_handle_that_is_shared_protects_no_more_than_it_covers():
    """Two answers to one prompt share its handle; what one of them adds is its own."""
    player = Player("lru", is_plain=False)
    tokens = np.arange(5 * PAGE, dtype=np.int32)
    shared = player.grow(player.begin(SCOPES[0], tokens), SCOPES[0], tokens[: 2 * PAGE], 0, ends=False)
    player.cache.lock(shared)
    own = player.grow(shared, SCOPES[0], tokens, 0, ends=False)
    assert player.cache.protected_pages == 5
    player.cache.unlock(own)
    assert (player.cache.protected_pages, player.cache.evictable_pages) == (2, 3)
    player.cache.unlock(shared)
    assert (player.cache.protected_pages, player.cache.evictable_pages) == (0, 5)
    player.cache.check_integrity()


def test_what_follows_another_request_s_pages_is_not_protected_by_it():
    player = Player("lru", is_plain=False)
    tokens = np.arange(5 * PAGE, dtype=np.int32)
    first, second = (player.begin(SCOPES[0], tokens) for _ in range(2))
    first = player.grow(first, SCOPES[0], tokens[: 2 * PAGE], 0, ends=False)
    player.grow(second, SCOPES[0], tokens, 0, ends=True)
    assert (player.cache.protected_pages, player.cache.evictable_pages) == (2, 3)
    assert player.cache.match(SCOPES[0], np.append(tokens, 0)).num_tokens == tokens.size


def test_a_child_of_lower_standing_goes_before_its_parent():
    """Priority 0 below a beginning of priority -1, which the child raises."""
    player = Player("priority", is_plain=False)
    tokens = np.arange(5 * PAGE, dtype=np.int32)
    player.grow(player.begin(SCOPES[0], tokens[: 3 * PAGE]), SCOPES[0], tokens[: 3 * PAGE], -1, ends=True)
    player.grow(player.begin(SCOPES[0], np.append(tokens[: 3 * PAGE], 0)), SCOPES[0], tokens, 0, ends=True)
    player.cache.evict(1)
    player.cache.check_integrity()
    assert player.cache.match(SCOPES[0], np.append(tokens, 0)).num_tokens == 4 * PAGE


def test_a_handle_from_before_an_eviction_is_refused_though_other_pages_stand_there_now():
    player = Player("lru", is_plain=False)
    tokens = np.arange(5 * PAGE, dtype=np.int32)
    player.grow(player.begin(SCOPES[0], tokens), SCOPES[0], tokens, 0, ends=True)
    stale = player.cache.match(SCOPES[0], np.append(tokens, 0))
    player.cache.evict(2)
    handle = player.begin(SCOPES[0], np.append(tokens[: 3 * PAGE], 0))
    other = np.append(tokens[: 3 * PAGE], tokens[: 3 * PAGE] + 50)
    player.grow(handle, SCOPES[0], other, 0, ends=False)
    with pytest.raises(DoubleFreeError, match="evicted or invalidated"):
        player.cache.lock(stale)


def test_an_advance_without_a_page_after_a_reset_gives_the_old_lock_back():
    player = Player("lru", is_plain=False)
    tokens = np.arange(3 * PAGE, dtype=np.int32)
    player.grow(player.begin(SCOPES[0], tokens), SCOPES[0], tokens, 0, ends=True)
    handle = player.begin(SCOPES[0], np.append(tokens, 0))
    player.cache.reset()
    handle = player.grow(handle, SCOPES[0], tokens[:0], 0, ends=False)
    player.cache.unlock(handle)
    assert player.cache.protected_pages == 0
    player.cache.check_integrity()


def test_a_sequence_that_grows_by_chunks_is_one_node():
    player = Player("lru", is_plain=False)
    tokens = np.arange(40 * PAGE, dtype=np.int32)
    handle = player.begin(SCOPES[0], tokens[:PAGE])
    for pages in range(4, 41, 4):
        handle = player.grow(handle, SCOPES[0], tokens[: pages * PAGE], 0, ends=False)
    assert len(list(handle.node.path())) == 1
    assert handle.num_tokens == tokens.size
    assert player.cache.match(SCOPES[0], tokens).num_tokens == tokens.size - PAGE


def test_a_handle_of_other_tokens_or_another_scope_is_not_gone_on_from():
    player = Player("lru", is_plain=False)
    tokens = np.arange(1, 4 * PAGE + 1, dtype=np.int32)
    handle = player.grow(player.begin(SCOPES[0], tokens), SCOPES[0], tokens, 0, ends=False)
    other = np.append(tokens + 1, tokens)
    player.grow(handle, SCOPES[0], other, 0, ends=True)
    handle = player.grow(player.begin(SCOPES[0], tokens), SCOPES[0], tokens, 0, ends=False)
    player.grow(handle, SCOPES[1], np.append(tokens, tokens), 0, ends=True)
    found = [
        player.cache.match(scope, np.append(each, 0)).num_tokens
        for scope, each in zip(SCOPES, [other, other], strict=True)
    ]
    assert found == [other.size, 0]
    assert player.cache.match(SCOPES[1], np.append(tokens, np.append(tokens, 0))).num_tokens == 2 * tokens.size
    assert player.cache.match(SCOPES[0], np.append(tokens, np.append(tokens, 0))).num_tokens == tokens.size
    assert player.cache.protected_pages == 0
    player.cache.check_integrity()


def cached_pages(cache, scope, tokens):
    """The pages that hold a sequence's whole pages in the tree, found node by node."""
    (tree,) = [tree for tree in cache._forest.trees() if tree.scope == scope]
    return [page for run in tree.walk(tokens).runs for page in run.tolist()]


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_a_handle_lists_the_cached_pages_of_the_whole_prefix(chunk):
    """Two requests compute the same tokens in turn, each into pages of its own: whose page came first is cached."""
    cache = RadixCache(PagedTokenToKVPoolAllocator(PAGES * PAGE, PAGE), PAGE)
    pool, tokens = cache.allocator.pages, np.arange(48 * PAGE, dtype=np.int32)
    rows = [pool.take([48]) for _ in range(2)]
    handles = [cache.match(SCOPES[0], tokens) for _ in rows]
    for handle in handles:
        cache.lock(handle)
    first_cached = []
    for turn, end in enumerate(range(chunk, 49, chunk)):
        for which in (turn % 2, 1 - turn % 2):  # in turn, so that the cached prefix holds pages of both
            mine = rows[which][:end]
            handles[which] = cache.advance(handles[which], SCOPES[0], tokens[: end * PAGE], mine)
            first_cached = [*first_cached, *mine[len(first_cached) :].tolist()]
            assert handles[which].pages.tolist() == first_cached == cached_pages(cache, SCOPES[0], tokens[: end * PAGE])
            assert handles[which].num_tokens == end * PAGE
    assert set(first_cached) > set(rows[0][:chunk].tolist())
    assert set(first_cached) - set(rows[0].tolist())
    cache.check_integrity()


def test_a_handle_lists_the_cached_pages_after_splits():
    cache = RadixCache(PagedTokenToKVPoolAllocator(PAGES * PAGE, PAGE), PAGE)
    pool, tokens = cache.allocator.pages, np.arange(24 * PAGE, dtype=np.int32)
    others, mine = pool.take([24]), pool.take([24])
    cache.insert(SCOPES[0], tokens[: 16 * PAGE], others[:16])  # one node, which is split below
    handle = cache.match(SCOPES[0], tokens[: 5 * PAGE + 1])
    cache.lock(handle)
    for end, split in ((7, 3), (12, 9), (20, 6), (24, 18)):
        branch = np.append(tokens[: split * PAGE], np.full(PAGE, -split, np.int32))
        found = cache.match(SCOPES[0], branch)  # parts ways in the middle of a node, above or below the handle
        cache.insert(SCOPES[0], branch, [*found.pages.tolist(), int(pool.take_singles(1)[0])])
        handle = cache.advance(handle, SCOPES[0], tokens[: end * PAGE], mine[:end])
        assert handle.pages.tolist() == [*others[:16].tolist(), *mine[16:].tolist()][:end]
        assert handle.pages.tolist() == cached_pages(cache, SCOPES[0], tokens[: end * PAGE])
        cache.check_integrity()
    pool.retain(handle.pages)  # what a row does that takes the cached pages and gives its own back
    pool.release(mine)
    assert cache.finish(handle, SCOPES[0], tokens, handle.pages) is None
    pool.release(handle.pages)
    cache.check_integrity()


def test_a_handle_whose_scope_is_of_old_weights_stays_as_it_is():
    cache = RadixCache(PagedTokenToKVPoolAllocator(PAGES * PAGE, PAGE), PAGE)
    tokens, pages = np.arange(8, dtype=np.int32), cache.allocator.pages.take([4])
    handle = cache.match(SCOPES[0], tokens)
    cache.lock(handle)
    handle = cache.advance(handle, SCOPES[0], tokens[:4], pages[:2])
    cache.raise_weights_epoch("model", 1)
    assert cache.advance(handle, SCOPES[0], tokens, pages) is handle
    assert handle.pages.tolist() == pages[:2].tolist()
    cache.unlock(handle)
    cache.check_integrity()
