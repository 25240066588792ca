from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_pages import PAGE_SIZE, page_format, random_pages, same_bits, scope

from engine.errors import ConfigError, IntegrityError, ShapeError
from engine.memory.offload.host_tier import HostTier
from engine.memory.offload.page_format import PageFormat

FORM = page_format()


def make_tier(pages, form=FORM):
    return HostTier(pages * form.page_bytes, form)


@pytest.fixture
def rng():
    return np.random.default_rng()


def random_tokens(rng, pages, extra=0):
    return rng.integers(0, 2**31 - 1, pages * PAGE_SIZE + extra).astype(np.int32)


def state_of(tier):
    """Everything that a refused call must leave as it was."""
    held = [(node.scope, node.key, node.row, node.checksum) for node in tier._used]
    return held, list(tier._free_rows), vars(tier.counters).copy(), tier._slab.tobytes()


class TestAgainstAModel:
    """A dict from (scope, whole prefix) to bits, in order of use, against the tier."""

    # Two pages' contents and two scopes: prefixes share pages, part ways and meet again all the time.
    operation = st.tuples(
        st.sampled_from(["put", "put", "match", "get", "reset", "corrupt"]),
        st.integers(0, 1),
        st.lists(st.integers(0, 1), min_size=1, max_size=5),
        st.integers(0, 5),
    )

    @given(st.integers(1, 8), st.lists(operation, max_size=40), st.integers(0, 2**32))
    @settings(max_examples=150)
    def test_tier_behaves_as_a_dict_in_order_of_use(self, capacity, operations, seed):
        rng = np.random.default_rng(seed)
        tier, model = make_tier(capacity), {}
        scopes = [scope(), scope(adapter="a")]
        corrupt = set()
        for name, which, content, first in operations:
            first = min(first, len(content))
            tokens = np.repeat(np.array(content, np.int32), PAGE_SIZE)
            keys = [(which, tuple(content[: end + 1])) for end in range(len(content))]
            run = list(itertools.takewhile(lambda key: key in model, keys[first:]))
            if name == "put":
                self.put(tier, model, capacity, (scopes[which], tokens, first), keys, rng)
            elif name == "match":
                assert tier.match(scopes[which], tokens, first) == len(run)
                touch(model, keys[: first + len(run)] if run else [])
            elif name == "get":
                good = run[: next((index for index, key in enumerate(run) if key in corrupt), len(run))]
                data = tier.get(scopes[which], tokens, first)
                assert len(data) == len(good)
                assert all(same_bits(page, model[key]) for page, key in zip(data, good, strict=True))
                for key in run[len(good) : len(good) + 1]:
                    del model[key]
                touch(model, keys[: first + len(good)] if run else [])
            elif name == "reset":
                tier.reset(scopes[which])
                for key in [key for key in model if key[0] == which]:
                    del model[key]
            elif run:
                self.corrupt(tier, scopes[which], tokens, first)
                corrupt ^= {run[0]}
            corrupt &= set(model)
            tier.check_integrity()
            assert tier.held_pages == len(model)
            assert tier.held_bytes <= capacity * FORM.page_bytes
        assert tier.counters.loaded_pages <= tier.counters.queried_pages

    @staticmethod
    def put(tier, model, capacity, where, keys, rng):
        of, tokens, first = where
        data = random_pages(rng, FORM, len(keys) - first)
        wanted = keys[first : first + capacity]
        new = [key for key in wanted if key not in model]
        assert tier.put(of, tokens, first, data) == len(new)
        if not wanted:
            return
        touch(model, wanted)
        while len(model) + len(new) > capacity:
            del model[next(iter(model))]
        model.update((key, data[keys.index(key) - first].copy()) for key in new)
        touch(model, keys[: first + len(wanted)])

    @staticmethod
    def corrupt(tier, of, tokens, page):
        node = tier._trie.walk(of, tokens)[page]
        tier._slab[node.row].view(np.uint8).reshape(-1)[7] ^= 1  # a second time mends it


def touch(model, keys):
    for key in reversed(keys):
        if key in model:
            model[key] = model.pop(key)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, ml_dtypes.float8_e4m3fn, np.int8])
def test_pages_come_back_bit_for_bit(rng, dtype):
    form = page_format(dtype)
    tier, tokens, data = make_tier(6, form), random_tokens(rng, 6, 3), random_pages(rng, form, 6)
    assert tier.put(scope(), tokens[:-3], 0, data) == 6
    assert tier.match(scope(), tokens, 0) == 6
    assert same_bits(tier.get(scope(), tokens, 0), data)
    assert same_bits(tier.get(scope(), tokens, 4), data[4:])


def test_what_goes_in_and_out_are_copies(rng):
    tier, tokens, data = make_tier(2), random_tokens(rng, 2), random_pages(rng, FORM, 2)
    kept = data.copy()
    tier.put(scope(), tokens, 0, data)
    data.view(np.uint8)[:] ^= 255
    tier.get(scope(), tokens, 0).view(np.uint8)[:] ^= 255
    assert same_bits(tier.get(scope(), tokens, 0), kept)


def test_a_page_needs_its_whole_prefix_equal(rng):
    tier, tokens = make_tier(3), random_tokens(rng, 3)
    tier.put(scope(), tokens, 2, random_pages(rng, FORM, 1))
    assert tier.match(scope(), tokens, 2) == 1
    for position in range(tokens.size):
        other = tokens.copy()
        other[position] ^= 1
        assert tier.match(scope(), other, 2) == 0


def test_no_two_scopes_share_a_page(rng):
    tier, tokens = make_tier(2), random_tokens(rng, 2)
    tier.put(scope(adapter="x"), tokens, 0, random_pages(rng, FORM, 2))
    for other in (scope(), scope(salt="x"), scope("x"), scope(adapter="x", epoch=1), scope(adapter="x", salt="x")):
        assert tier.match(other, tokens, 0) == 0


def test_a_prefix_is_evicted_from_its_end(rng):
    tier, tokens, data = make_tier(4), random_tokens(rng, 4), random_pages(rng, FORM, 4)
    tier.put(scope(), tokens, 0, data)
    tier.put(scope(), random_tokens(rng, 3), 0, random_pages(rng, FORM, 3))
    assert same_bits(tier.get(scope(), tokens, 0), data[:1])
    assert tier.counters.evicted_pages == 3


def test_a_match_keeps_pages_from_giving_way(rng):
    tier, tokens, others = make_tier(2), random_tokens(rng, 1), random_tokens(rng, 1)
    tier.put(scope(), tokens, 0, random_pages(rng, FORM, 1))
    tier.put(scope(), others, 0, random_pages(rng, FORM, 1))
    tier.match(scope(), tokens, 0)
    tier.put(scope(), random_tokens(rng, 1), 0, random_pages(rng, FORM, 1))
    assert (tier.match(scope(), tokens, 0), tier.match(scope(), others, 0)) == (1, 0)


def test_of_too_many_pages_the_first_are_kept(rng):
    tier, tokens, data = make_tier(3), random_tokens(rng, 7), random_pages(rng, FORM, 7)
    assert tier.put(scope(), tokens, 0, data) == 3
    assert same_bits(tier.get(scope(), tokens, 0), data[:3])
    tier.check_integrity()


def test_hits_are_counted_when_pages_are_taken_and_not_when_they_are_looked_up(rng):
    tier, tokens = make_tier(4), random_tokens(rng, 4)
    tier.put(scope(), tokens[: 3 * PAGE_SIZE], 0, random_pages(rng, FORM, 3))
    tier.match(scope(), tokens, 0)
    assert (tier.counters.queried_pages, tier.counters.loaded_pages) == (0, 0)
    tier.get(scope(), tokens, 1)
    assert (tier.counters.queried_pages, tier.counters.loaded_pages, tier.counters.stored_pages) == (3, 2, 3)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_one_flipped_bit_anywhere_is_found(rng, dtype):
    form = page_format(dtype)
    tokens, data = random_tokens(rng, 3), random_pages(rng, form, 3)
    for byte in range(form.page_bytes):
        tier = make_tier(3, form)
        tier.put(scope(), tokens, 0, data)
        row = tier._trie.walk(scope(), tokens)[1].row
        tier._slab[row].reshape(-1).view(np.uint8)[byte] ^= 1 << rng.integers(8)
        assert same_bits(tier.get(scope(), tokens, 0), data[:1])
        assert tier.counters.rejected_pages == 1
        assert tier.held_pages == 2
        assert tier.match(scope(), tokens, 0) == 1
        tier.check_integrity()


def test_a_corrupt_page_can_be_put_again(rng):
    tier, tokens, data = make_tier(3), random_tokens(rng, 3), random_pages(rng, FORM, 3)
    tier.put(scope(), tokens, 0, data)
    tier._slab[tier._trie.walk(scope(), tokens)[0].row] = data[1]
    assert len(tier.get(scope(), tokens, 0)) == 0
    assert tier.put(scope(), tokens, 0, data) == 1
    assert same_bits(tier.get(scope(), tokens, 0), data)


def test_reset_forgets_one_scope_or_all(rng):
    tier, tokens = make_tier(8), random_tokens(rng, 2)
    scopes = [scope(salt=salt) for salt in "abc"]
    for each in scopes:
        tier.put(each, tokens, 0, random_pages(rng, FORM, 2))
    tier.reset(scopes[1])
    assert [tier.match(each, tokens, 0) for each in scopes] == [2, 0, 2]
    tier.reset()
    assert (tier.held_pages, tier._trie.scopes()) == (0, [])
    tier.check_integrity()


@given(st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 1), min_size=1, max_size=5)), max_size=12))
@settings(max_examples=60)
def test_segments_carry_every_page_once_and_in_order_of_use(puts):
    rng = np.random.default_rng()
    tier = make_tier(9)
    for which, content in puts:
        tokens = np.repeat(np.array(content, np.int32), PAGE_SIZE)
        first = int(rng.integers(len(content)))
        tier.put(scope(salt=str(which)), tokens, first, random_pages(rng, FORM, len(content) - first))
    segments = list(tier.segments())
    assert sum(len(segment.data) for segment in segments) == tier.held_pages
    copy = make_tier(9)
    assert sum(copy.put(each.scope, each.token_ids, each.first_page, each.data) for each in segments) == tier.held_pages
    copy.check_integrity()
    smaller = make_tier(max(1, tier.held_pages // 2))
    for each in segments:
        smaller.put(each.scope, each.token_ids, each.first_page, each.data)
        assert same_bits(copy.get(each.scope, each.token_ids, each.first_page)[: len(each.data)], each.data)
    if segments:  # what was used last survives in a smaller tier
        assert smaller.match(segments[-1].scope, segments[-1].token_ids, segments[-1].first_page)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tier, t, d: tier.put(scope(), t[:-1], 0, d), "11 tokens do not end 3 pages of 4 after first_page=0"),
        (lambda tier, t, d: tier.put(scope(), t, 1, d), "first_page=1"),
        (lambda tier, t, d: tier.put(scope(), t, -1, d), "first_page=-1"),
        (lambda tier, t, d: tier.put(scope(), t, 0, d[:, :1]), r"a page here is bfloat16\[2, 4, 4, 3\]"),
        (lambda tier, t, d: tier.put(scope(), t, 0, d.view(np.float16)), "float16"),
        (lambda tier, t, d: tier.put(scope(), t.astype(float), 0, d), "must hold integers"),
        (lambda tier, t, d: tier.put(scope(), t.astype(np.int64) + 2**31, 0, d), "int32"),
        (lambda tier, t, d: tier.put(scope(), t.reshape(3, 4), 0, d), "one axis"),
        (lambda tier, t, d: tier.match(scope(), t, 4), "start_page=4 is not within the 3 whole pages"),
        (lambda tier, t, d: tier.get(scope(), t, -1), "start_page=-1"),
    ],
)
def test_a_refused_call_changes_nothing(rng, call, message):
    tier, tokens, data = make_tier(4), random_tokens(rng, 3), random_pages(rng, FORM, 3)
    tier.put(scope(), tokens, 0, data)
    before = state_of(tier)
    with pytest.raises(ShapeError, match=message):
        call(tier, tokens, data)
    assert state_of(tier) == before


def test_a_budget_below_one_page_is_refused():
    with pytest.raises(ConfigError, match=f"holds no page: one is {FORM.page_bytes} bytes"):
        HostTier(FORM.page_bytes - 1, FORM)


def test_a_foreign_format_is_refused_field_by_field():
    with pytest.raises(ConfigError, match=r"of a peer is another: order 'halves' \(here 'interleaved'\)"):
        FORM.require_same(page_format(order="halves").to_dict(), "a peer")
    with pytest.raises(ConfigError, match=r"layer_num 3 \(here 2\), version None \(here 1\)"):
        FORM.require_same({k: v for k, v in page_format(layer_num=3).to_dict().items() if k != "version"}, "a peer")
    FORM.require_same(page_format().to_dict(), "a peer")


@pytest.mark.parametrize("changes", [{"page_size": 0}, {"head_num": "2"}, {"head_dim": None}, {"dtype": "float32"}])
def test_a_descriptor_without_usable_sizes_is_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        PageFormat(2, FORM.dtype, {**FORM.layout, **changes})


@pytest.mark.parametrize(
    "damage",
    [
        lambda tier: tier._free_rows.append(tier._free_rows[0]),
        lambda tier: tier._free_rows.pop(),
        lambda tier: tier._used.popitem(),
        lambda tier: tier._used.move_to_end(next(iter(tier._used))),
        lambda tier: tier._trie.grow(scope(), np.arange(PAGE_SIZE, dtype=np.int32)),
    ],
)
def test_check_integrity_finds_damage(rng, damage):
    tier = make_tier(5)
    tier.put(scope(), random_tokens(rng, 3), 0, random_pages(rng, FORM, 3))
    tier.check_integrity()
    damage(tier)
    with pytest.raises(IntegrityError):
        tier.check_integrity()
