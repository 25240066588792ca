from __future__ import annotations

import itertools
from dataclasses import replace

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
    held = [(node.scope, node.group, node.key, node.row, node.checksum) for node in tier._used]
    return held, list(tier._free_rows), vars(tier.counters).copy(), tier._slab.tobytes()


class TestAgainstAModel:
    """A dict from (scope, group, whole prefix) to bits, in order of use, against the tier."""

    # Two pages' contents, two scopes, up to three groups: prefixes share pages, part ways and meet again all the time.
    operation = st.tuples(
        st.sampled_from(["put", "put", "put", "held", "get", "reset", "corrupt"]),
        st.integers(0, 1),
        st.integers(0, 2),
        st.lists(st.integers(0, 1), min_size=1, max_size=5),
        st.integers(0, 5),
    )

    @given(
        st.integers(1, 8),
        st.sampled_from([(None,), (8,), (None, 8), (8, 5), (None, 8, 8), (None, None, 3)]),
        st.lists(operation, max_size=40),
        st.integers(0, 2**32),
    )
    @settings(max_examples=300)
    def test_tier_behaves_as_a_dict_in_order_of_use(self, capacity, windows, operations, seed):
        rng = np.random.default_rng(seed)
        tier, model = make_tier(capacity, replace(FORM, windows=windows)), {}
        scopes = [scope(), scope(adapter="a")]
        corrupt = set()
        for name, which, group, content, first in operations:
            first, group = min(first, len(content)), group % len(windows)
            tokens = np.repeat(np.array(content, np.int32), PAGE_SIZE)
            keys = [(which, group, tuple(content[: end + 1])) for end in range(len(content))]
            run = list(itertools.takewhile(lambda key: key in model, keys[first:]))
            used_from = 0 if windows[group] is None else first
            if name == "put":
                self.put(tier, model, capacity, (scopes[which], tokens, first, group), keys, used_from, rng)
            elif name == "held":
                before = state_of(tier)
                assert tier.held(scopes[which], tokens, group=group).tolist() == [key in model for key in keys]
                assert state_of(tier) == before
            elif name == "get":
                good = run[: next((index for index, key in enumerate(run) if key in corrupt), len(run))]
                data = tier.get(scopes[which], tokens, first, group=group)
                assert len(data) == len(good)
                assert all(same_bits(page, model[key]) for page, key in zip(data, good, strict=True))
                for key in run[len(good) : len(good) + 1]:
                    del model[key]
                touch(model, keys[used_from : first + len(good)] if run else [])
            elif name == "reset":
                tier.reset(scopes[which])
                for key in [key for key in model if key[0] == which]:
                    del model[key]
            elif run:
                self.corrupt(tier, (scopes[which], group, tokens), first)
                corrupt ^= {run[0]}
            corrupt &= set(model)
            tier.check_integrity()
            assert tier.held_pages == len(model)
            assert tier.held_bytes <= capacity * FORM.page_bytes
            assert [tier.holds(each) for each in scopes] == [any(key[0] == at for key in model) for at in (0, 1)]
        assert tier.counters.loaded_pages <= tier.counters.queried_pages

    @staticmethod
    def put(tier, model, capacity, where, keys, used_from, rng):
        of, tokens, first, group = where
        data = random_pages(rng, FORM, len(keys) - first)
        wanted = keys[first : first + capacity]
        new = [key for key in wanted if key not in model]
        assert tier.put(of, tokens, first, data, group) == len(new)
        if not wanted:
            return
        touch(model, wanted)
        while len(model) + len(new) > capacity:
            del model[next(iter(model))]
        model.update((key, data[keys.index(key) - first].copy()) for key in new)
        touch(model, keys[used_from : first + len(wanted)])

    @staticmethod
    def corrupt(tier, where, page):
        node = tier._trie.walk(*where)[page]
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
    assert tier.held(scope(), tokens).tolist() == [True] * 6
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
    assert tier.held(scope(), tokens).tolist() == [False, False, True]
    for position in range(tokens.size):
        other = tokens.copy()
        other[position] ^= 1
        assert not tier.held(scope(), other).any()


def test_no_two_scopes_share_a_page(rng):
    tier, tokens = make_tier(2), random_tokens(rng, 2)
    tier.put(scope(adapter="x"), tokens, 0, random_pages(rng, FORM, 2))
    for other in (scope(), scope(salt="x"), scope("x"), scope(adapter="x", epoch=1), scope(adapter="x", salt="x")):
        assert not tier.held(other, tokens).any()
        assert not tier.holds(other)


def test_no_two_groups_share_a_page(rng):
    form = replace(FORM, windows=(None, 8, 8))
    tier, tokens = make_tier(6, form), random_tokens(rng, 2)
    data = [random_pages(rng, form, 2) for _ in form.windows]
    for group, pages in enumerate(data):
        assert not tier.held(scope(), tokens, group=group).any()
        assert tier.put(scope(), tokens, 0, pages, group) == 2
    assert all(same_bits(tier.get(scope(), tokens, 0, group=group), pages) for group, pages in enumerate(data))


def test_a_prefix_is_evicted_from_its_end(rng):
    tier, tokens, data = make_tier(4), random_tokens(rng, 4), random_pages(rng, FORM, 4)
    tier.put(scope(), tokens, 0, data)
    tier.put(scope(), random_tokens(rng, 3), 0, random_pages(rng, FORM, 3))
    assert same_bits(tier.get(scope(), tokens, 0), data[:1])
    assert tier.counters.evicted_pages == 3


@pytest.mark.parametrize("uses", [True, False])
def test_a_get_keeps_pages_from_giving_way_and_a_look_does_not(rng, uses):
    tier, tokens, others = make_tier(2), random_tokens(rng, 1), random_tokens(rng, 1)
    tier.put(scope(), tokens, 0, random_pages(rng, FORM, 1))
    tier.put(scope(), others, 0, random_pages(rng, FORM, 1))
    if uses:
        tier.get(scope(), tokens, 0)
    else:
        tier.held(scope(), tokens)
    tier.put(scope(), random_tokens(rng, 1), 0, random_pages(rng, FORM, 1))
    assert [tier.held(scope(), each).tolist() for each in (tokens, others)] == [[uses], [not uses]]


def put_session(tier, rng, tokens, window_pages):
    """A prefix with its pages of full attention and the last of a window, as one step evicts them."""
    form, pages = tier.page_format, tokens.size // PAGE_SIZE
    tier.put(scope(), tokens, 0, random_pages(rng, form, pages))
    tier.put(scope(), tokens, pages - window_pages, random_pages(rng, form, window_pages), 1)


def test_the_least_recently_used_prefix_gives_way_whole_before_a_page_of_another_in_any_group(rng):
    tier = make_tier(3 * (6 + 2), replace(FORM, windows=(None, 2 * PAGE_SIZE)))
    sessions = [random_tokens(rng, 6) for _ in range(3)]
    for tokens in sessions:
        put_session(tier, rng, tokens, 2)
    first = sessions[0]
    assert (len(tier.get(scope(), first, 0)), len(tier.get(scope(), first, 4, group=1))) == (6, 2)  # now the last used
    put_session(tier, rng, random_tokens(rng, 6), 2)
    held = [[int(tier.held(scope(), tokens, group=group).sum()) for group in (0, 1)] for tokens in sessions]
    assert held == [[6, 2], [0, 0], [6, 2]]


def test_windows_that_a_sequence_has_left_behind_go_before_what_its_next_turn_needs(rng):
    tier = make_tier(9 + 3 * 2, replace(FORM, windows=(None, 2 * PAGE_SIZE)))
    tokens = random_tokens(rng, 9)
    for pages in (3, 6, 9):  # three turns
        put_session(tier, rng, tokens[: pages * PAGE_SIZE], 2)
        assert len(tier.get(scope(), tokens[: pages * PAGE_SIZE], pages - 2, group=1)) == 2
    put_session(tier, rng, random_tokens(rng, 2), 2)
    assert tier.held(scope(), tokens).all()
    assert tier.held(scope(), tokens, group=1).tolist() == [False] * 7 + [True] * 2


def test_of_too_many_pages_the_first_are_kept(rng):
    tier, tokens, data = make_tier(3), random_tokens(rng, 7), random_pages(rng, FORM, 7)
    assert tier.put(scope(), tokens, 0, data) == 3
    assert same_bits(tier.get(scope(), tokens, 0), data[:3])
    tier.check_integrity()


def test_hits_are_counted_when_pages_are_taken_and_not_when_they_are_looked_up(rng):
    tier, tokens = make_tier(4), random_tokens(rng, 4)
    tier.put(scope(), tokens[: 3 * PAGE_SIZE], 0, random_pages(rng, FORM, 3))
    tier.held(scope(), tokens)
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
        row = tier._trie.walk(scope(), 0, tokens)[1].row
        tier._slab[row].reshape(-1).view(np.uint8)[byte] ^= 1 << rng.integers(8)
        assert same_bits(tier.get(scope(), tokens, 0), data[:1])
        assert tier.counters.rejected_pages == 1
        assert tier.held_pages == 2
        assert tier.held(scope(), tokens).tolist() == [True, False, True]
        tier.check_integrity()


def test_a_corrupt_page_can_be_put_again(rng):
    tier, tokens, data = make_tier(3), random_tokens(rng, 3), random_pages(rng, FORM, 3)
    tier.put(scope(), tokens, 0, data)
    tier._slab[tier._trie.walk(scope(), 0, tokens)[0].row] = data[1]
    assert len(tier.get(scope(), tokens, 0)) == 0
    assert tier.put(scope(), tokens, 0, data) == 1
    assert same_bits(tier.get(scope(), tokens, 0), data)


def test_reset_forgets_one_scope_or_all(rng):
    tier, tokens = make_tier(8), random_tokens(rng, 2)
    scopes = [scope(salt=salt) for salt in "abc"]
    for each in scopes:
        tier.put(each, tokens, 0, random_pages(rng, FORM, 2))
    tier.reset(scopes[1])
    assert [int(tier.held(each, tokens).sum()) for each in scopes] == [2, 0, 2]
    assert [tier.holds(each) for each in scopes] == [True, False, True]
    tier.reset()
    assert (tier.held_pages, tier._trie.scopes()) == (0, [])
    tier.check_integrity()


def put_segment(tier, segment):
    return tier.put(segment.scope, segment.token_ids, segment.first_page, segment.data, segment.group)


segment_puts = st.tuples(
    st.integers(0, 1), st.integers(0, 1), st.lists(st.integers(0, 1), min_size=1, max_size=5), st.integers(0, 4)
)


@given(st.lists(segment_puts, max_size=12))
@settings(max_examples=100)
def test_segments_carry_every_page_once_and_in_order_of_use(puts):
    rng = np.random.default_rng()
    form = replace(FORM, windows=(None, 8))
    tier = make_tier(9, form)
    for which, group, content, first in puts:
        tokens, first = np.repeat(np.array(content, np.int32), PAGE_SIZE), min(first, len(content) - 1)
        tier.put(scope(salt=str(which)), tokens, first, random_pages(rng, form, len(content) - first), group)
    segments = list(tier.segments())
    assert sum(len(segment.data) for segment in segments) == tier.held_pages
    copy = make_tier(9, form)
    assert sum(put_segment(copy, each) for each in segments) == tier.held_pages
    copy.check_integrity()
    smaller = make_tier(max(1, tier.held_pages // 2), form)
    for each in segments:
        put_segment(smaller, each)
        data = copy.get(each.scope, each.token_ids, each.first_page, group=each.group)
        assert same_bits(data[: len(each.data)], each.data)
    if segments:  # what was used last survives in a smaller tier
        last = segments[-1]
        assert smaller.held(last.scope, last.token_ids, group=last.group)[last.first_page]


def test_a_window_that_was_used_last_outlives_in_a_smaller_tier_those_before_it(rng):
    form = replace(FORM, windows=(None, 2 * PAGE_SIZE))
    tier, tokens, smaller = make_tier(9, form), random_tokens(rng, 6), make_tier(2, form)
    tier.put(scope(), tokens, 0, random_pages(rng, form, 6), 1)
    tier.get(scope(), tokens, 4, group=1)
    segments = list(tier.segments(2))
    assert [(each.first_page, len(each.data), each.group) for each in segments] == [(2, 2, 1), (0, 2, 1), (4, 2, 1)]
    for each in segments:
        put_segment(smaller, each)
    assert smaller.held(scope(), tokens, group=1).tolist() == [False] * 4 + [True] * 2


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
        (lambda tier, t, d: tier.get(scope(), t, 4), "start_page=4 is not within the 3 whole pages"),
        (lambda tier, t, d: tier.put(scope(), t, 0, d, 1), r"group=1 is none of the 1 groups .* windows \[None\]"),
        (lambda tier, t, d: tier.get(scope(), t, 0, group=-1), "group=-1"),
        (lambda tier, t, d: tier.held(scope(), t, group=True), "group=True"),
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
    with pytest.raises(ConfigError, match=r"windows \[None, 512\] \(here \[None, 1024, 1024\]\)"):
        replace(FORM, windows=(None, 1024, 1024)).require_same(replace(FORM, windows=(None, 512)).to_dict(), "a peer")
    FORM.require_same(page_format().to_dict(), "a peer")


@pytest.mark.parametrize("windows", [(), None, [None], (0,), (None, -1), (8.0,), (True,), ("8",)])
def test_windows_that_are_none_are_refused(windows):
    with pytest.raises(ConfigError, match="windows="):
        replace(FORM, windows=windows)


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
        lambda tier: tier._trie.grow(scope(), 0, np.arange(PAGE_SIZE, dtype=np.int32)),
    ],
)
def test_check_integrity_finds_damage(rng, damage):
    tier = make_tier(5)
    tier.put(scope(), random_tokens(rng, 3), 0, random_pages(rng, FORM, 3))
    tier.check_integrity()
    damage(tier)
    with pytest.raises(IntegrityError):
        tier.check_integrity()
