"""A save takes every cached page once, from device and host, in bounded batches, and leaves everything where it is."""

import numpy as np
import pytest
from prefix_pages import PAGE_SIZE, page_format, scope
from pretend_pool import PretendPool

from engine.memory import saved_segments
from engine.memory.manager import CacheManager
from engine.memory.offload.host_tier import HostTier
from engine.memory.offload.store import PrefixStore
from engine.memory.saved_segments import cached_segments

FORM = page_format(np.int32, layer_num=1)


def content(tokens):
    """What the last page of a sequence holds: a digest of all its tokens."""
    return np.random.default_rng(tokens.astype(np.uint32)).integers(0, 2**31, FORM.page_shape, np.int32)


def make(pages=64, *, tier_pages, replicas=1):
    tier = HostTier(tier_pages * FORM.page_bytes, FORM)
    caches = [CacheManager(pages * PAGE_SIZE, PAGE_SIZE, 4, pages * PAGE_SIZE) for _ in range(replicas)]
    for cache in caches:
        cache.attach_host_tier(tier)
        cache.pool = PretendPool(cache, FORM.page_shape, np.int32)
    return caches


def segments_of(caches):
    for cache in caches:
        cache.pool.make_moves()
    return cached_segments(caches, lambda replica, pages: caches[replica].pool.read(pages))


def serve(cache, tokens, of=None):
    """One request: what is not cached is computed; all of it is cached when it ends."""
    tokens, of = np.asarray(tokens, np.int32), of or scope()
    admitted = cache.admit(of, tokens)
    known = admitted.cached_tokens + admitted.loaded_tokens
    cache.grow(np.array([admitted.row], np.int32), np.array([len(tokens) - known]))
    cache.pool.run_step(admitted.row, len(tokens))
    for index, page in enumerate(cache.page_table.row_pages(admitted.row).tolist()):
        end = (index + 1) * PAGE_SIZE
        if known < end <= len(tokens):
            cache.pool.content[page] = content(tokens[:end])
    cache.release(admitted.row, of, tokens)
    return known


def saved_pages(segments):
    """Each saved page by its scope and tokens; checks that none comes twice, and what it holds."""
    found = set()
    for segment in segments:
        assert len(segment.token_ids) == (segment.first_page + len(segment.data)) * PAGE_SIZE
        for index, data in enumerate(segment.data):
            tokens = segment.token_ids[: (segment.first_page + index + 1) * PAGE_SIZE]
            key = (segment.scope, tokens.tobytes())
            assert key not in found
            assert np.array_equal(data, content(tokens))
            found.add(key)
    return found


def every_page(sequences, of=None):
    return {
        (of or scope(), np.asarray(tokens[:end], np.int32).tobytes())
        for tokens in sequences
        for end in range(PAGE_SIZE, len(tokens) + 1, PAGE_SIZE)
    }


def random_sequences(rng, count, pages):
    """Some begin alike, some go on from others; none is longer than `2 * pages` pages, for the pool must hold it."""
    sequences = [rng.integers(0, 50, pages * PAGE_SIZE).tolist()]
    while len(sequences) < count:
        before = sequences[rng.integers(len(sequences))]
        kept = int(rng.integers(min(len(before) // PAGE_SIZE, pages) + 1)) * PAGE_SIZE
        sequences.append(before[:kept] + rng.integers(0, 50, int(rng.integers(1, pages)) * PAGE_SIZE).tolist())
    return sequences


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.mark.parametrize("tier_pages", [1, 100])
def test_all_that_is_on_the_device_is_saved_and_stays_there_however_small_the_tier(rng, tier_pages):
    (cache,) = make(tier_pages=tier_pages)
    sequences = random_sequences(rng, 6, 6)
    for tokens in sequences:
        serve(cache, tokens)
    before = (cache.prefix.cached_pages, cache.host_tier.held_pages, cache.prefix.evicted_pages)
    assert saved_pages(segments_of([cache])) == every_page(sequences)
    assert (cache.prefix.cached_pages, cache.host_tier.held_pages, cache.prefix.evicted_pages) == before
    cache.check_integrity()
    assert [serve(cache, [*tokens, 1]) for tokens in sequences] == [len(tokens) for tokens in sequences]


def test_what_is_on_the_host_is_saved_beside_what_is_on_the_device_and_what_is_on_both_once(rng):
    (cache,) = make(pages=12, tier_pages=200)
    sequences = random_sequences(rng, 12, 5)
    for tokens in [*sequences, *sequences[:3]]:  # some come back from the host, and stay there
        serve(cache, tokens)
    assert cache.host_tier.held_pages > 0
    assert saved_pages(segments_of([cache])) == every_page(sequences)
    cache.check_integrity()


def test_replicas_that_hold_the_same_prefix_save_it_once(rng):
    caches = make(tier_pages=4, replicas=3)
    sequences = random_sequences(rng, 9, 6)
    for cache in caches:
        for index in rng.permutation(9)[:6]:
            serve(cache, sequences[index])
    serve(caches[0], sequences[0])
    cached = set().union(*(saved_pages(segments_of([cache])) for cache in caches))
    assert saved_pages(segments_of(caches)) == cached


def test_scopes_are_kept_apart_and_what_cannot_be_found_any_more_is_not_saved(rng):
    (cache,) = make(tier_pages=4)
    tokens = rng.integers(0, 50, 4 * PAGE_SIZE).tolist()
    for of in (scope(), scope(salt="a"), scope(epoch=1)):
        serve(cache, tokens, of)
    kept = every_page([tokens], scope(epoch=1))
    assert saved_pages(segments_of([cache])) == kept | every_page([tokens]) | every_page([tokens], scope(salt="a"))
    cache.prefix.raise_weights_epoch("m", 1)
    assert saved_pages(segments_of([cache])) == kept


def test_a_save_reads_and_holds_one_batch_at_a_time(rng, monkeypatch):
    monkeypatch.setattr(saved_segments, "BATCH_BYTES", 3 * FORM.page_bytes)
    (cache,) = make(pages=32, tier_pages=64)
    sequences = [rng.integers(0, 2**31, 20 * PAGE_SIZE).tolist() for _ in range(3)]
    for tokens in sequences:
        serve(cache, tokens)
    assert cache.host_tier.held_pages > 3
    cache.pool.largest_read = 0
    segments = list(segments_of([cache]))
    assert max(len(segment.data) for segment in segments) == 3
    assert cache.pool.largest_read == 3
    assert saved_pages(segments) == every_page(sequences)


def test_a_chain_of_small_nodes_is_saved_as_one_run(rng):
    """A file a node would repeat the tokens before it: quadratic in the length of a conversation."""
    (cache,) = make(pages=64, tier_pages=1)
    tokens = rng.integers(0, 2**31, 60 * PAGE_SIZE).tolist()
    for end in range(PAGE_SIZE, len(tokens) + 1, PAGE_SIZE):
        assert cache.prefix.insert(scope(), tokens[:end], pages_of(cache, tokens[:end])) == end - PAGE_SIZE
    (segment,) = segments_of([cache])
    assert len(segment.data) == 60


def pages_of(cache, tokens):
    held = cache.prefix.match(scope(), [*tokens, 0]).pages
    fresh = cache.allocator.alloc(len(tokens) - held.size * PAGE_SIZE)[::PAGE_SIZE] // PAGE_SIZE
    for page in fresh:
        cache.pool.content[page] = content(np.asarray(tokens, np.int32))
    return np.append(held, fresh)


@pytest.mark.parametrize("tier_pages", [1, 5, 11, 40])
def test_a_tier_that_is_smaller_takes_back_what_was_used_last_from_its_beginning_on(
    rng, tmp_path, monkeypatch, tier_pages
):
    monkeypatch.setattr(saved_segments, "BATCH_PAGES", 2)
    (cache,) = make(tier_pages=tier_pages)
    sequences = [rng.integers(0, 2**31, 10 * PAGE_SIZE).tolist() for _ in range(3)]
    for tokens in sequences:
        serve(cache, tokens)
    PrefixStore(tmp_path, FORM).save(segments_of([cache]))
    (again,) = make(tier_pages=tier_pages)
    for segment in PrefixStore(tmp_path, FORM).load():
        again.host_tier.put(segment.scope, segment.token_ids, segment.first_page, segment.data)
    again.host_tier.check_integrity()
    assert again.host_tier.held_pages == min(tier_pages, 30)
    found = [len(again.host_tier.get(scope(), tokens, 0)) for tokens in reversed(sequences)]
    assert sum(found) == min(tier_pages, 30)  # no page without those before it
    assert found == [min(10, max(0, tier_pages - start)) for start in (0, 10, 20)]
