"""The prefix cache against a model: for each scope, a dict from page-aligned prefixes to pages."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.errors import DoubleFreeError
from engine.memory.page_allocator import PagedTokenToKVPoolAllocator
from engine.memory.prefix_cache import RadixCache
from engine.memory.scope import Adapter, CacheScope, LayoutKey

TOTAL_PAGES = 24
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

    def __init__(self, match, entries):
        self.match = match
        self.entries = entries
        self.locks = 0


class PrefixCacheMachine(RuleBasedStateMachine):
    @initialize(page_size=st.sampled_from([1, 3]), policy=st.sampled_from(["lru", "lfu", "priority"]))
    def start(self, page_size, policy):
        self.page_size = page_size
        self.allocator = PagedTokenToKVPoolAllocator(TOTAL_PAGES * page_size, page_size)
        self.cache = RadixCache(self.allocator, page_size, policy=policy, on_evict=self.forget)
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
                assert self.allocator.ref_count([page])[0] == 1, "released before its contents could be saved"
            self.told += len(prefixes)

    def lose(self, scope):
        self.lost += self.live.pop(scope, {}).values()

    tenants = st.integers(0, len(TENANTS) - 1)
    sequences = st.lists(st.integers(0, 1), min_size=0, max_size=24)

    @rule(tenant=tenants, tokens=sequences, reuse=st.booleans(), priority=st.integers(-2, 2), old=st.integers(0, 4))
    def insert(self, tenant, tokens, reuse, priority, old):
        scope = self.scope(tenant, age=old // 4)
        known = self.known(scope, tokens)
        count = len(tokens) // self.page_size
        mine = [entry.page for entry in known] if reuse else []
        need = count - len(mine)
        if need > self.allocator.available_pages():
            return
        # The pages that the request reuses get it as a holder before anything else.
        self.allocator.retain(np.array(mine, np.int32))
        fresh = self.allocator.alloc(need * self.page_size)[:: self.page_size] // self.page_size
        pages = np.array([*mine, *fresh], np.int32)
        cached = self.cache.insert(scope, tokens, pages, priority=priority)
        assert cached == len(known) * self.page_size
        if scope.weights_epoch == self.epoch:
            for prefix, page in list(zip(self.prefixes(tokens), pages.tolist(), strict=True))[len(known) :]:
                self.live.setdefault(scope, {})[prefix] = Entry(page)
        self.allocator.release(pages)

    @rule(tenant=tenants, tokens=sequences)
    def match(self, tenant, tokens):
        scope = self.scope(tenant)
        match = self.cache.match(scope, np.array(tokens, np.int32))
        entries = self.known(scope, tokens[:-1])
        assert match.num_tokens == len(entries) * self.page_size
        assert match.pages.tolist() == [entry.page for entry in entries]
        self.matches.append(Held(match, entries))

    @rule(data=st.data())
    def lock(self, data):
        self.use(data, self.cache.lock, self.lock_model)

    @rule(data=st.data())
    def record(self, data):
        self.use(data, self.cache.record, self.record_model)

    def use(self, data, call, then):
        if not self.matches:
            return
        held = data.draw(st.sampled_from(self.matches))
        reachable = {entry for entries in self.live.values() for entry in entries.values()}
        if reachable.issuperset(held.entries) or (held.locks and call == self.cache.record):
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

    @rule(data=st.data())
    def unlock(self, data):
        if not self.matches:
            return
        held = data.draw(st.sampled_from(self.matches))
        if held.locks == 0:
            with pytest.raises(DoubleFreeError, match="holds no lock"):
                self.cache.unlock(held.match)
            return
        self.cache.unlock(held.match)
        held.locks -= 1
        for entry in held.entries:
            entry.locks -= 1

    @rule(count=st.integers(0, 8))
    def evict(self, count):
        free, lost = self.allocator.available_pages(), [entry for entry in self.lost if entry.locks == 0]
        wanted, self.told = min(count, self.cache.evictable_pages), 0
        assert self.cache.evict(count) == wanted
        assert self.allocator.available_pages() == free + wanted
        assert wanted - self.told == min(wanted, len(lost)), "what cannot be reached goes first"
        self.forget_released()

    @rule(tenant=st.none() | tenants)
    def reset(self, tenant):
        free = self.allocator.available_pages()
        scope = None if tenant is None else self.scope(tenant)
        released = self.cache.reset(scope)
        for each in [scope] if scope else list(self.live):
            self.lose(each)
        assert self.allocator.available_pages() == free + released
        self.forget_released()

    @rule()
    def replace_weights(self):
        cached = self.cache.cached_pages
        self.epoch += 1
        self.cache.raise_weights_epoch("model", self.epoch)
        for scope in list(self.live):
            self.lose(scope)
        assert self.cache.cached_pages == cached

    def forget_released(self):
        """A lost entry has left when its page is free, for nobody else holds pages between two rules."""
        gone = [entry for entry in self.lost if self.allocator.ref_count([entry.page])[0] == 0]
        assert all(entry.locks == 0 for entry in gone)
        self.lost = [entry for entry in self.lost if entry not in gone]

    @invariant()
    def cache_and_model_agree(self):
        entries = [entry for entries in self.live.values() for entry in entries.values()] + self.lost
        assert self.cache.cached_pages == len(entries)
        assert self.cache.protected_pages == sum(entry.locks > 0 for entry in entries)
        assert self.cache.evictable_pages == sum(entry.locks == 0 for entry in entries)
        assert self.allocator.available_pages() + self.cache.cached_pages == TOTAL_PAGES
        assert (self.cache.query_tokens, self.cache.hit_tokens) == (self.queries, self.hits)
        self.cache.check_integrity()
        self.allocator.check_integrity(holders=[entry.page for entry in entries])

    @invariant()
    def every_prefix_is_found_in_its_scope_alone(self):
        for tenant in range(len(TENANTS)):
            scope = self.scope(tenant)
            for prefix in self.live.get(scope, {}):
                match = self.cache.match(scope, np.array([*prefix, 7], np.int32))
                assert match.pages.tolist() == [entry.page for entry in self.known(scope, list(prefix))]


TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
