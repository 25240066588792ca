"""The prefix cache against a model: for each scope, a dict from page-aligned prefixes to pages."""

import numpy as np
import pytest
from cache_mirror import CacheMirror
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import DoubleFreeError
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator
from engine.memory.prefix.cache import RadixCache
from engine.memory.scope import Adapter, CacheScope, LayoutKey

TOTAL_PAGES = 32
LAYOUT = LayoutKey.of({"order": "interleaved", "head_dim": 64})
# Names that would collide were they joined as strings.
TENANTS = [(None, "x"), (Adapter("x"), ""), (None, "")]


class Entry:
    """One cached page of the model."""

    def __init__(self, page):
        self.page = page
        self.locks = 0


class Held:
    """A match of the model: the entries it covers, root first."""

    def __init__(self, match, entries, scope, tokens):
        self.match = match
        self.entries = entries
        self.scope = scope
        self.tokens = tokens
        self.locks = 0


class PrefixCacheMachine(RuleBasedStateMachine):
    @initialize(page_size=st.sampled_from([1, 3]), policy=st.sampled_from(["lru", "lfu", "priority"]))
    def start(self, page_size, policy):
        self.page_size = page_size
        self.allocator = PagedTokenToKVPoolAllocator(TOTAL_PAGES * page_size, page_size)
        self.cache = RadixCache(self.allocator, page_size, policy=policy, on_evict=self.forget, max_events=50)
        self.mirror = CacheMirror(self.cache)
        self.epoch = 0
        self.live = {}  # scope -> {prefix: Entry}
        self.lost = []  # entries that cannot be reached any more but were not seen to leave
        self.matches = []
        self.queries = self.hits = self.told = 0

    def scope(self, tenant, age=0):
        adapter, salt = TENANTS[tenant]
        return CacheScope("model", max(self.epoch - age, 0), adapter, salt, LAYOUT)

    def prefixes(self, tokens):
        """The page-aligned prefixes of a sequence, shortest first."""
        return [tuple(tokens[: end * self.page_size]) for end in range(1, len(tokens) // self.page_size + 1)]

    def known(self, scope, tokens):
        entries = self.live.get(scope, {})
        return [entries[prefix] for prefix in self.prefixes(tokens) if prefix in entries]

    def forget(self, evicted):
        for run in evicted:
            prefixes = self.prefixes(run.token_ids.tolist())[run.first_page :]
            assert len(prefixes) == len(run.pages)
            for prefix, page in zip(prefixes, run.pages.tolist(), strict=True):
                entry = self.live[run.scope].pop(prefix)
                assert (entry.page, entry.locks) == (page, 0)
                assert self.allocator.pages.ref_count([page])[0] == 1, "released before its contents could be saved"
            self.told += len(prefixes)

    def lose(self, scope):
        self.lost += self.live.pop(scope, {}).values()

    tenants = st.integers(0, len(TENANTS) - 1)
    # Zeros and a few others: most begin alike, so that much is shared and many nodes are split.
    sequences = st.builds(
        lambda zeros, rest: [0] * zeros + rest, st.integers(0, 12), st.lists(st.integers(0, 1), max_size=3)
    )
    growth = st.lists(st.integers(0, 1), min_size=1, max_size=9)
    seldom = st.integers(0, 4)  # of what empties the cache: everything else needs something there

    @rule(tenant=tenants, tokens=sequences, reuse=st.booleans(), priority=st.integers(-2, 2), old=st.integers(0, 4))
    def insert(self, tenant, tokens, reuse, priority, old):
        scope = self.scope(tenant, age=old // 4)
        count = len(tokens) // self.page_size
        if not self.make_room(count):
            return
        known = self.known(scope, tokens)
        mine = [entry.page for entry in known] if reuse else []
        need = count - len(mine)
        # The pages that the request reuses get it as a holder before anything else.
        self.allocator.pages.retain(np.array(mine, np.int32))
        fresh = self.allocator.alloc(need * self.page_size)[:: self.page_size] // self.page_size
        pages = np.array([*mine, *fresh], np.int32)
        cached = self.cache.insert(scope, tokens, pages, priority=priority)
        assert cached == len(known) * self.page_size
        self.insert_model(scope, tokens, pages)
        self.allocator.pages.release(pages)

    def insert_model(self, scope, tokens, pages):
        if scope.weights_epoch == self.epoch:
            entries = self.live.setdefault(scope, {}) if pages.size else self.live.get(scope, {})
            for prefix, page in zip(self.prefixes(tokens), pages.tolist(), strict=True):
                entries.setdefault(prefix, Entry(page))

    @precondition(lambda self: any(held.locks for held in self.matches))
    @rule(data=st.data(), more=growth, go_on=st.integers(0, 9), ends=st.booleans(), priority=st.integers(-2, 2))
    def grow(self, data, more, go_on, ends, priority):
        """A request goes on from a locked match, as a rule with a longer sequence, and perhaps ends."""
        held = data.draw(st.sampled_from([held for held in self.matches if held.locks]))
        tokens = (held.tokens if go_on else []) + more
        tokens = tokens[: len(tokens) // self.page_size * self.page_size]
        if not self.make_room(len(tokens) // self.page_size):
            return
        pages = self.allocator.alloc(len(tokens))[:: self.page_size] // self.page_size
        if ends:
            self.cache.finish(held.match, held.scope, tokens, pages, priority=priority)
        else:
            match = self.cache.advance(held.match, held.scope, tokens, pages, priority=priority)
        self.insert_model(held.scope, tokens, pages)
        if ends:
            self.unlock_model(held)
        elif held.scope.weights_epoch == self.epoch:
            entries = self.known(held.scope, tokens)
            assert match.pages.tolist() == [entry.page for entry in entries]
            grown = Held(match, entries, held.scope, tokens)
            self.lock_model(grown)
            self.unlock_model(held)
            self.remember(grown)
        else:
            assert match is held.match
        self.allocator.pages.release(pages)
        self.forget_released()

    @rule(tenant=tenants, tokens=sequences)
    def match(self, tenant, tokens):
        scope = self.scope(tenant)
        match = self.cache.match(scope, np.array(tokens, np.int32))
        entries = self.known(scope, tokens[:-1])
        assert match.num_tokens == len(entries) * self.page_size
        assert match.pages.tolist() == [entry.page for entry in entries]
        self.remember(Held(match, entries, scope, tokens[: match.num_tokens]))

    def remember(self, held):
        """Keeps a few handles; the oldest is released, or unreleased pages would soon fill the pool."""
        self.matches.append(held)
        if len(self.matches) > 5:
            oldest = self.matches.pop(0)
            while oldest.locks:
                self.cache.unlock(oldest.match)
                self.unlock_model(oldest)

    @rule(tenant=tenants, tokens=sequences)
    def begin(self, tenant, tokens):
        """What a request does first."""
        self.match(tenant, tokens)
        self.cache.lock(self.matches[-1].match)
        self.lock_model(self.matches[-1])

    @precondition(lambda self: self.matches)
    @rule(data=st.data())
    def lock(self, data):
        self.use(data, self.cache.lock, self.lock_model)

    @precondition(lambda self: self.matches)
    @rule(data=st.data())
    def record(self, data):
        self.use(data, self.cache.record, self.record_model)

    def use(self, data, call, then):
        held = data.draw(st.sampled_from(self.matches))
        reachable = {entry for entries in self.live.values() for entry in entries.values()}
        if reachable.issuperset(held.entries) or held.locks:
            call(held.match)
            then(held)
        else:
            with pytest.raises(DoubleFreeError, match="evicted or invalidated"):
                call(held.match)

    def lock_model(self, held):
        held.locks += 1
        for entry in held.entries:
            entry.locks += 1

    def record_model(self, held):
        self.queries += held.match.num_queried
        self.hits += held.match.num_tokens

    @precondition(lambda self: self.matches)
    @rule(data=st.data())
    def unlock(self, data):
        held = data.draw(st.sampled_from(self.matches))
        if held.locks == 0:
            with pytest.raises(DoubleFreeError, match="holds no lock"):
                self.cache.unlock(held.match)
            return
        self.cache.unlock(held.match)
        self.unlock_model(held)

    def unlock_model(self, held):
        held.locks -= 1
        for entry in held.entries:
            entry.locks -= 1

    @rule(count=st.integers(0, 8))
    def evict(self, count):
        free, lost = self.allocator.pages.available, [entry for entry in self.lost if entry.locks == 0]
        wanted, self.told = min(count, self.cache.evictable_pages), 0
        assert self.cache.evict(count) == wanted
        assert self.allocator.pages.available == free + wanted
        assert wanted - self.told == min(wanted, len(lost)), "what cannot be reached goes first"
        self.forget_released()

    def make_room(self, pages):
        """Evicts what is short; whether there are so many pages now."""
        short = pages - self.allocator.pages.available
        if 0 < short <= self.cache.evictable_pages:
            self.evict(short)
        return pages <= self.allocator.pages.available

    @rule(tenant=st.none() | tenants, chance=seldom)
    def reset(self, tenant, chance):
        if chance:
            return
        free = self.allocator.pages.available
        scope = None if tenant is None else self.scope(tenant)
        released = self.cache.reset(scope)
        for each in [scope] if scope else list(self.live):
            self.lose(each)
        assert self.allocator.pages.available == free + released
        self.forget_released()

    @rule(chance=seldom)
    def replace_weights(self, chance):
        if chance:
            return
        cached = self.cache.cached_pages
        self.epoch += 1
        self.cache.raise_weights_epoch("model", self.epoch)
        for scope in list(self.live):
            self.lose(scope)
        assert self.cache.cached_pages == cached

    def forget_released(self):
        """A lost entry has left when its page is free, because nothing else holds pages between two rules."""
        gone = [entry for entry in self.lost if self.allocator.pages.ref_count([entry.page])[0] == 0]
        assert all(entry.locks == 0 for entry in gone)
        self.lost = [entry for entry in self.lost if entry not in gone]

    @invariant()
    def cache_and_model_agree(self):
        entries = [entry for entries in self.live.values() for entry in entries.values()] + self.lost
        assert self.cache.cached_pages == len(entries)
        assert self.cache.protected_pages == sum(entry.locks > 0 for entry in entries)
        assert self.cache.evictable_pages == sum(entry.locks == 0 for entry in entries)
        assert self.allocator.pages.available + self.cache.cached_pages == TOTAL_PAGES
        assert (self.cache.query_tokens, self.cache.hit_tokens) == (self.queries, self.hits)
        self.cache.check_integrity()
        self.allocator.check_integrity(holders=[entry.page for entry in entries])

    @invariant()
    def who_follows_the_events_knows_all_that_is_found(self):
        self.mirror.follow()
        live = {
            entry.page: (scope, prefix) for scope, entries in self.live.items() for prefix, entry in entries.items()
        }
        assert self.mirror.prefixes == live

    @invariant()
    def every_prefix_is_found_in_its_scope_alone(self):
        for tenant in range(len(TENANTS)):
            scope = self.scope(tenant)
            for prefix in self.live.get(scope, {}):
                match = self.cache.match(scope, np.array([*prefix, 7], np.int32))
                assert match.pages.tolist() == [entry.page for entry in self.known(scope, list(prefix))]


TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
