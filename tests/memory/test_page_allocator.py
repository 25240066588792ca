"""What each call of the allocator returns and refuses."""

from __future__ import annotations

import gc
import pickle

import numpy as np
import pytest
from allocator_model import fingerprint, pages_of

from engine.errors import ConfigError, DoubleFreeError, EngineError, IntegrityError, KVPoolExhausted, ShapeError
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator

NONE = [-1]


@pytest.fixture
def allocator() -> PagedTokenToKVPoolAllocator:
    return PagedTokenToKVPoolAllocator(size=40, page_size=4)


def refuses(allocator, error, call, match=None):
    before = fingerprint(allocator.backup_state())
    with pytest.raises(error, match=match) as caught:
        call()
    assert fingerprint(allocator.backup_state()) == before, "a refused call changed something"
    return caught.value


@pytest.mark.parametrize("page_size", [1, 2, 3, 7, 16, 100, 256])
def test_every_slot_but_the_null_pages_is_handed_out_once(page_size):
    allocator = PagedTokenToKVPoolAllocator(12 * page_size, page_size)
    slots = np.concatenate([allocator.alloc(5 * page_size), allocator.alloc(7 * page_size)])
    assert slots.dtype == np.int32
    assert sorted(slots.tolist()) == list(range(page_size, 13 * page_size))
    assert allocator.available_size() == 0


def test_extend_fills_the_partial_page_before_it_takes_a_new_one(allocator):
    first = allocator.alloc_extend([0], [6], NONE)
    other = allocator.alloc_extend([0], [1], NONE)
    second = allocator.alloc_extend([6, 1], [9, 3], [first[-1], other[-1]])
    assert second[:2].tolist() == [first[-1] + 1, first[-1] + 2]
    assert second[2] % 4 == 0
    assert second[3:].tolist() == [other[-1] + 1, other[-1] + 2]
    assert allocator.pages.available == 10 - 2 - 1 - 1


def test_extend_within_the_partial_page_takes_no_page(allocator):
    first = allocator.alloc_extend([0], [1], NONE)
    assert allocator.alloc_extend([1], [3], first).tolist() == [first[0] + 1, first[0] + 2]
    assert allocator.pages.available == 9


def test_decode_takes_a_page_only_where_a_token_begins_one(allocator):
    a, b = allocator.alloc_extend([0], [3], NONE), allocator.alloc_extend([0], [4], NONE)
    slots = allocator.alloc_decode([4, 5, 1], [a[-1], b[-1], -1])
    assert slots.dtype == np.int32
    assert slots[0] == a[-1] + 1
    assert (slots[1:] % 4 == 0).all()
    assert allocator.pages.available == 10 - 2 - 2


def test_empty_batches_and_sizes_are_legal(allocator):
    empty = np.array([], np.int32)
    for slots in (allocator.alloc(0), allocator.alloc_extend([], [], []), allocator.alloc_decode([], []),
                  allocator.alloc_extend([0], [0], NONE)):  # fmt: skip
        assert slots.shape == (0,)
        assert slots.dtype == np.int32
    allocator.free(empty)
    allocator.pages.release([])
    allocator.pages.retain([])
    assert allocator.available_size() == 40


def test_free_releases_the_pages_of_its_slots_once_each(allocator):
    slots = allocator.alloc(12)
    allocator.free([int(slots[0]), int(slots[3]), int(slots[5])])
    assert allocator.pages.available == 9
    assert allocator.pages.ref_count(sorted(pages_of(slots, 4))).tolist() == [0, 0, 1]


def test_a_page_is_free_when_its_last_holder_releases_it(allocator):
    slots = allocator.alloc(8)
    pages = sorted(pages_of(slots, 4))
    allocator.pages.retain(pages + pages)
    allocator.free(slots)
    assert allocator.pages.available == 8
    allocator.pages.release(pages)
    assert allocator.pages.ref_count(pages).tolist() == [1, 1]
    allocator.pages.release(pages)
    assert allocator.pages.available == 10


def test_double_free_is_refused(allocator):
    kept, slots = allocator.alloc(4), allocator.alloc(8)
    allocator.free(slots)
    refuses(allocator, DoubleFreeError, lambda: allocator.free(slots))
    refuses(allocator, DoubleFreeError, lambda: allocator.free(np.concatenate([kept, slots])))
    refuses(allocator, DoubleFreeError, lambda: allocator.pages.release([kept[0] // 4, kept[0] // 4]))


@pytest.mark.parametrize("slot", [0, 3, -1, -4, 44, 10_000, 2**40, -(2**40)])
def test_the_null_page_and_slots_outside_of_the_pool_are_refused(allocator, slot):
    slots = allocator.alloc(40)
    refuses(allocator, DoubleFreeError, lambda: allocator.free([int(slots[0]), slot]))
    refuses(allocator, DoubleFreeError, lambda: allocator.pages.release([1, slot // 4]))
    refuses(allocator, ShapeError, lambda: allocator.pages.retain([1, slot // 4]))


@pytest.mark.parametrize("stale", [lambda slots: slots, lambda slots: slots[4:9], lambda slots: slots[::-1][:3]])
def test_a_stale_free_after_reuse_is_refused(allocator, stale):
    old = allocator.alloc(40)
    allocator.free(old)
    new = allocator.alloc(40)
    assert old.tolist() == new.tolist()
    refuses(allocator, DoubleFreeError, lambda: allocator.free(stale(old)), "stale")
    allocator.free(new)


def test_a_stale_free_is_refused_for_extended_and_decoded_slots_too():
    allocator = PagedTokenToKVPoolAllocator(8, 4)
    first = allocator.alloc_extend([0], [3], NONE)
    second = allocator.alloc_decode([4], first[-1:])
    allocator.free(second)
    allocator.alloc(8)
    refuses(allocator, DoubleFreeError, lambda: allocator.free(first), "stale")
    refuses(allocator, DoubleFreeError, lambda: allocator.free(second), "stale")


def test_slots_of_a_page_that_was_held_throughout_are_not_stale(allocator):
    slots = allocator.alloc(4)
    allocator.free(allocator.alloc(36))
    allocator.alloc(36)
    allocator.free(slots)
    assert allocator.pages.available == 1


def test_an_array_that_died_leaves_no_memory_behind(allocator):
    allocator.free(allocator.alloc(40))
    gc.collect()
    slots = allocator.alloc(40)
    allocator.free(slots.copy())
    assert not allocator.pages.handouts._by_id.keys() - {id(slots)}


def test_exhaustion_says_how_much_was_asked_and_changes_nothing(allocator):
    held = allocator.alloc_extend([0], [30], NONE)
    error = refuses(allocator, KVPoolExhausted, lambda: allocator.alloc(12), "3 pages of 4 tokens: 2 of 10")
    assert (error.requested, error.available) == (12, 8)
    error = refuses(allocator, KVPoolExhausted, lambda: allocator.alloc_extend([0, 30], [8, 33], [-1, held[-1]]))
    assert (error.requested, error.available) == (12, 8)
    refuses(allocator, KVPoolExhausted, lambda: allocator.alloc_decode([1, 1, 1], [-1, -1, -1]))
    refuses(allocator, KVPoolExhausted, lambda: allocator.alloc_extend([0] * 4, [2**62] * 4, [-1] * 4))
    refuses(allocator, KVPoolExhausted, lambda: allocator.alloc(2**80))
    assert allocator.alloc(8).size == 8


@pytest.mark.parametrize("last_loc", [-1, -5, 0, 1, 44, 10**6, "wrong offset", "free page"])
def test_a_last_loc_that_cannot_end_the_sequence_is_refused(allocator, last_loc):
    slots = allocator.alloc_extend([0], [6], NONE)
    freed = allocator.alloc(4)
    allocator.free(freed)
    last = {"wrong offset": slots[-1] - 1, "free page": freed[1]}.get(last_loc, last_loc)
    refuses(allocator, ShapeError, lambda: allocator.alloc_extend([6], [9], [last]), "last_loc")
    refuses(allocator, ShapeError, lambda: allocator.alloc_decode([7], [last]), "last_loc")


def test_a_multiple_of_the_page_size_needs_a_last_loc_too(allocator):
    allocator.alloc(40)
    refuses(allocator, ShapeError, lambda: allocator.alloc_extend([4], [4], NONE), "last_loc")


@pytest.mark.parametrize("last_loc", [0, 3, 7, -2, -4, 43])
def test_a_first_token_has_no_last_loc(allocator, last_loc):
    allocator.alloc(4)
    refuses(allocator, ShapeError, lambda: allocator.alloc_extend([0], [2], [last_loc]), "last_loc")
    refuses(allocator, ShapeError, lambda: allocator.alloc_decode([1], [last_loc]), "last_loc")


def test_a_shared_partial_page_is_not_appended_to(allocator):
    slots = allocator.alloc_extend([0], [6], NONE)
    allocator.pages.retain([slots[-1] // 4])
    refuses(allocator, ShapeError, lambda: allocator.alloc_decode([7], slots[-1:]), "2 holders")
    refuses(allocator, ShapeError, lambda: allocator.alloc_extend([6], [7], slots[-1:]), "2 holders")
    assert allocator.alloc_extend([6], [6], slots[-1:]).size == 0


def test_two_sequences_do_not_append_to_one_page(allocator):
    last = allocator.alloc_extend([0], [6], NONE)[-1]
    refuses(allocator, ShapeError, lambda: allocator.alloc_decode([7, 7], [last, last]), "2 sequences")
    refuses(allocator, ShapeError, lambda: allocator.alloc_extend([6, 6], [7, 20], [last, last]), "2 sequences")


def test_a_shared_full_page_is_continued_in_a_new_page(allocator):
    prefix = allocator.alloc(4)
    allocator.pages.retain([prefix[0] // 4])
    slots = allocator.alloc_decode([5, 5], [prefix[-1], prefix[-1]])
    assert len(pages_of(slots, 4)) == 2


BAD_VECTORS = [[[1]], 1, [1.0], ["1"], [True], [None]]


@pytest.mark.parametrize("bad", BAD_VECTORS, ids=repr)
def test_what_is_no_integer_vector_is_refused(allocator, bad):
    allocator.alloc(8)
    for call in (allocator.free, allocator.pages.release, allocator.pages.retain, allocator.pages.ref_count,
                 lambda x: allocator.alloc_extend(x, [2], NONE), lambda x: allocator.alloc_extend([0], x, NONE),
                 lambda x: allocator.alloc_extend([0], [2], x), lambda x: allocator.alloc_decode(x, NONE),
                 lambda x: allocator.alloc_decode([1], x)):  # fmt: skip
        refuses(allocator, ShapeError, lambda call=call: call(bad))


@pytest.mark.parametrize(
    ("prefix", "ends", "last"),
    [
        ([0, 0], [1], [-1]),
        ([0], [1], [-1, -1]),
        ([3], [2], [6]),
        ([-1], [2], [-1]),
        ([-4], [-2], [-1]),
        ([0], [-1], [-1]),
    ],
)
def test_lengths_that_do_not_fit_are_refused(allocator, prefix, ends, last):
    allocator.alloc(8)
    refuses(allocator, ShapeError, lambda: allocator.alloc_extend(prefix, ends, last))


@pytest.mark.parametrize("lens", [[0], [-1], [-(2**62)]])
def test_decode_counts_the_new_token(allocator, lens):
    refuses(allocator, ShapeError, lambda: allocator.alloc_decode(lens, NONE), "at least 1")


@pytest.mark.parametrize("need", [-4, 3, 4.0, "4", None, True])
def test_alloc_takes_whole_pages(allocator, need):
    refuses(allocator, ShapeError, lambda: allocator.alloc(need), "need_size")


@pytest.mark.parametrize(
    ("size", "page_size"),
    [(0, 4), (-4, 4), (4, 0), (4, -1), (10, 4), (4.0, 4), (4, "4"), (2**31, 4), (True, 1), (2, 4)],
)
def test_a_pool_that_cannot_be_is_refused(size, page_size):
    with pytest.raises(ConfigError, match=r"size|page_size"):
        PagedTokenToKVPoolAllocator(size, page_size)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_any_integer_dtype_is_read(allocator, dtype):
    slots = allocator.alloc(8).astype(dtype)
    allocator.free(slots)
    assert allocator.available_size() == 40


def test_restore_brings_back_the_moment_of_the_backup_again_and_again(allocator):
    kept, state = allocator.alloc(8), allocator.backup_state()
    before = fingerprint(state)
    after = []
    for _ in range(2):
        draft = allocator.alloc(24)
        allocator.free(kept)
        after.append(draft.tolist())
        allocator.restore_state(state)
        assert fingerprint(allocator.backup_state())[:3] == before[:3]
        allocator.check_integrity(sorted(pages_of(kept, 4)))
    assert after[0] == after[1]
    allocator.free(kept)


def test_slots_from_after_the_backup_are_void_after_the_restore(allocator):
    allocator.alloc(36)
    state = allocator.backup_state()
    draft = allocator.alloc(4)
    allocator.restore_state(state)
    new = allocator.alloc(4)
    assert draft.tolist() == new.tolist()
    refuses(allocator, DoubleFreeError, lambda: allocator.free(draft), "stale")
    allocator.free(new)


def test_slots_from_before_a_later_state_are_valid_when_it_is_restored(allocator):
    early = allocator.backup_state()
    slots = allocator.alloc(8)
    late = allocator.backup_state()
    allocator.restore_state(early)
    allocator.restore_state(late)
    allocator.free(slots)
    assert allocator.available_size() == 40


def test_a_state_survives_pickling(allocator):
    slots = allocator.alloc(8)
    state = pickle.loads(pickle.dumps(allocator.backup_state()))
    other = PagedTokenToKVPoolAllocator(40, 4)
    other.restore_state(state)
    other.check_integrity(sorted(pages_of(slots, 4)))
    assert not pages_of(other.alloc(32), 4) & pages_of(slots, 4)


@pytest.mark.parametrize(("size", "page_size"), [(44, 4), (40, 8), (40, 2)])
def test_a_foreign_state_is_refused(allocator, size, page_size):
    state = PagedTokenToKVPoolAllocator(size, page_size).backup_state()
    refuses(allocator, ConfigError, lambda: allocator.restore_state(state), "both must be equal")
    refuses(allocator, ConfigError, lambda: allocator.restore_state(None), "backup_state")


def test_clear_frees_everything_and_makes_old_slots_stale(allocator):
    old = allocator.alloc(40)
    allocator.clear()
    assert allocator.available_size() == 40
    allocator.check_integrity([])
    allocator.alloc(40)
    refuses(allocator, DoubleFreeError, lambda: allocator.free(old), "stale")


@pytest.mark.parametrize(
    ("harm", "page"),
    [
        (lambda pool: pool._ref_count.__setitem__(3, 0), 3),
        (lambda pool: pool._ref_count.__setitem__(9, 1), 9),
        (lambda pool: pool._ref_count.__setitem__(9, -1), 9),
        (lambda pool: pool._ref_count.__setitem__(0, 1), 0),
        (lambda pool: pool._free.put(np.array([0], np.int32)), 0),
        (lambda pool: pool._free.put(np.array([2], np.int32)), 2),
        (lambda pool: pool._free.put(np.array([7], np.int32)), 7),
        (lambda pool: pool._free.take_singles(1), 10),
    ],
)
def test_check_integrity_names_the_wrong_page(allocator, harm, page):
    allocator.alloc(16)
    allocator.check_integrity()
    harm(allocator.pages)
    with pytest.raises(IntegrityError, match=f"page {page} "):
        allocator.check_integrity()


def test_check_integrity_finds_a_leak_and_a_release_too_many(allocator):
    allocator.alloc(12)
    allocator.check_integrity([1, 2, 3])
    for holders, page in (([1, 2], 3), ([1, 2, 3, 3], 3), ([1, 2, 3, 4], 4)):
        with pytest.raises(IntegrityError, match=f"page {page} "):
            allocator.check_integrity(holders)


def test_every_refusal_is_one_of_the_family(allocator):
    for call in (lambda: allocator.alloc(44), lambda: allocator.free([99]), lambda: allocator.alloc(3)):
        refuses(allocator, EngineError, call)


def test_an_array_void_at_a_snapshot_stays_void_when_it_is_restored() -> None:
    allocator = PagedTokenToKVPoolAllocator(16, 4)
    first = allocator.alloc(4)
    before = allocator.backup_state()
    allocator.free(first.copy())
    void = allocator.alloc(4)
    allocator.restore_state(before)
    allocator.restore_state(allocator.backup_state())
    with pytest.raises(DoubleFreeError):
        allocator.free(void)
    allocator.free(first)


def test_a_negative_prefix_is_refused() -> None:
    allocator = PagedTokenToKVPoolAllocator(16, 4)
    held = allocator.alloc(4)
    for prefix, end in ((-4, 0), (-(2**63), 2**63 - 1)):
        with pytest.raises(ShapeError, match="a length is 0 or more"):
            allocator.alloc_extend([prefix], [end], [held[3]])
    assert allocator.available_size() == 12


def test_pages_are_handed_out_by_sequence_and_all_or_none(allocator):
    pages = allocator.pages.take([2, 0, 1])
    assert pages.dtype == np.int32
    assert len(set(pages.tolist())) == 3
    assert 0 not in pages
    allocator.check_integrity(pages)
    most = allocator.pages.available
    refuses(allocator, KVPoolExhausted, lambda: allocator.pages.take([1, most]))
    refuses(allocator, ShapeError, lambda: allocator.pages.take([1, -1]), "0 or more")
    assert allocator.pages.take([0, 0]).size == 0
    allocator.pages.release(pages)
    allocator.check_integrity([])


@pytest.mark.parametrize("count", [-1, 1.5, True, None, "1"])
def test_single_pages_are_counted_in_whole_numbers(count):
    allocator = PagedTokenToKVPoolAllocator(32, 4)
    held = allocator.pages.take_singles(3)
    with pytest.raises(ShapeError, match="must be an integer, 0 or more"):
        allocator.pages.take_singles(count)
    assert allocator.pages.available == 5
    allocator.pages.release(held)
    allocator.check_integrity()


def test_single_pages_beyond_the_free_ones_are_refused():
    allocator = PagedTokenToKVPoolAllocator(32, 4)
    with pytest.raises(KVPoolExhausted):
        allocator.pages.take_singles(9)
    assert sorted(allocator.pages.take_singles(8).tolist()) == list(range(1, 9))
