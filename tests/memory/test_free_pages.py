"""Fresh pages lie together where they can, and what is freed grows together again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.memory.pages.free_runs import FreePages
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator


def runs(pages: np.ndarray) -> list[int]:
    """Lengths of the ascending runs of neighbours in ``pages``."""
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    return [part.size for part in np.split(pages, breaks)] if pages.size else []


def lengths(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def fragmented(num_pages: int, free: list[int]) -> FreePages:
    bag = FreePages(num_pages)
    bag.take_runs(lengths(num_pages))
    bag.put(np.array(free, np.int32))
    return bag


def test_a_fresh_pool_is_one_run():
    bag = FreePages(100)
    assert runs(bag.take_runs(lengths(30, 20))) == [50]
    assert runs(bag.take_runs(lengths(50))) == [50]


def test_a_run_is_found_among_scattered_singles():
    bag = fragmented(64, [*range(1, 32, 2), *range(40, 56)])
    assert runs(bag.take_runs(lengths(16))) == [16]


def test_each_sequence_gets_a_run_of_its_own_where_runs_fit():
    bag = fragmented(100, [*range(1, 11), *range(20, 30), *range(40, 50)])
    taken = bag.take_runs(lengths(6, 6, 6))
    assert [runs(part) for part in np.split(taken, [6, 12])] == [[6], [6], [6]]
    assert bag.count == 12


def test_what_was_set_aside_is_not_lost():
    bag = fragmented(100, [*range(1, 11), *range(20, 30)])
    bag.take_runs(lengths(6, 6))
    assert sorted(bag.take_runs(lengths(8)).tolist()) == [7, 8, 9, 10, 26, 27, 28, 29]
    assert bag.count == 0


def test_singles_come_from_the_shortest_runs():
    bag = fragmented(100, [2, 4, *range(20, 40), 60])
    bag.put(np.array([], np.int32))
    bag.take_runs(lengths(4))
    assert sorted(bag.take_singles(3).tolist()) == [2, 4, 60]
    assert runs(bag.take_runs(lengths(16))) == [16]


def test_a_run_comes_from_the_smallest_that_holds_it():
    allocator = PagedTokenToKVPoolAllocator(100 * 4, 4)
    parts = np.split(allocator.pages.take([100]), [3, 10, 15, 20, 26])
    for part in (parts[0], parts[2], parts[4]):  # runs of 3, 5 and 6, with others between
        allocator.pages.release(part)
    allocator.pages.release(parts[5][10:])  # and of 64
    assert allocator.pages.take([3]).tolist() == parts[0].tolist()
    allocator.pages.release(parts[0])
    assert allocator.pages.take([4, 5]).tolist() == [*parts[2][:4], *parts[4][:5]]
    assert allocator.alloc(4 * 4).tolist() == [int(page) * 4 + at for page in parts[5][10:14] for at in range(4)]
    assert allocator.alloc_extend([0], [10], [-1]).size == 10  # 3 pages: the first run again
    assert parts[0][0] not in allocator.pages.free_pages()


@given(data=st.data(), num_pages=st.integers(1, 120))
@settings(max_examples=150)
def test_the_fit_is_best_whatever_was_given_back_before(data, num_pages):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    bag, held = FreePages(num_pages), np.array([], np.int32)
    for _ in range(data.draw(st.integers(1, 30))):
        free = np.sort(bag.all())
        found = sorted(runs(free))
        action = rng.integers(3)
        if action == 0 and held.size:
            held = rng.permutation(held)
            cut = int(rng.integers(1, min(held.size, 9) + 1))
            bag.put(held[:cut].copy())
            held = held[cut:]
        elif action == 1:
            held = np.concatenate([held, bag.take_singles(int(rng.integers(0, min(bag.count, 3) + 1)))])
        elif found:
            want = int(rng.integers(1, found[-1] + 1))
            taken = bag.take_runs(lengths(want))
            fit = min(length for length in found if length >= want)
            assert runs(taken) == [want]
            assert sorted([*runs(np.sort(bag.all())), fit]) == sorted([*found, *([fit - want] if fit > want else [])])
            held = np.concatenate([held, taken])


def test_a_large_pool_in_many_runs_costs_no_look_at_each():
    num_pages = 2**20
    bag = FreePages(num_pages)
    held = bag.take_runs(lengths(num_pages))
    bag.put(held[::2].copy())
    assert bag.take_runs(lengths(1)).size == 1
    bag.put(held[1:2].copy())
    bag._put_in_order = lambda: pytest.fail("all runs were looked at for one page")
    assert bag.take_runs(lengths(1)).size == 1


@pytest.mark.parametrize("num_pages", [50, 5_000])
def test_a_pool_that_was_freed_at_random_heals(num_pages):
    rng = np.random.default_rng()
    bag = FreePages(num_pages)
    held = bag.take_runs(lengths(num_pages))
    for part in np.array_split(rng.permutation(held), 17):
        bag.put(part)
    assert runs(bag.take_runs(lengths(num_pages))) == [num_pages]


@given(data=st.data(), num_pages=st.integers(1, 200))
@settings(max_examples=150)
def test_a_lone_sequence_gets_a_run_if_any_is_long_enough(data, num_pages):
    # All are loose, so that the first taking merges them; else that waits until an eighth is.
    free = data.draw(st.sets(st.integers(1, num_pages), min_size=1))
    bag = fragmented(num_pages, sorted(free))
    longest = max(runs(np.array(sorted(free))))
    want = data.draw(st.integers(1, longest))
    assert runs(bag.take_runs(lengths(want))) == [want]


@given(data=st.data(), num_pages=st.sampled_from([3, 40, 3_000]))
@settings(max_examples=150)
def test_pages_are_neither_lost_nor_doubled(data, num_pages):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    bag, held, snapshot = FreePages(num_pages), np.array([], np.int32), None
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["runs", "singles", "put", "snapshot", "restore"]))
        if action == "runs":
            wanted = rng.multinomial(rng.integers(0, bag.count + 1), [1 / 4] * 4)
            held = np.concatenate([held, bag.take_runs(wanted.astype(np.int64))])
        elif action == "singles":
            held = np.concatenate([held, bag.take_singles(int(rng.integers(0, bag.count + 1)))])
        elif action == "put":
            held = rng.permutation(held)
            cut = int(rng.integers(0, held.size + 1))
            bag.put(held[:cut].copy())
            held = held[cut:]
        elif action == "snapshot":
            snapshot = bag.snapshot(), held
        elif snapshot is not None:
            bag.restore(snapshot[0])
            held = snapshot[1]
        assert sorted([*bag.all().tolist(), *held.tolist()]) == list(range(1, num_pages + 1))
        assert bag.count == num_pages - held.size


def test_sequences_of_a_batch_each_get_consecutive_slots():
    allocator = PagedTokenToKVPoolAllocator(1024 * 16, 16)
    slots = allocator.alloc_extend([0] * 64, [256] * 64, [-1] * 64).reshape(64, 256)
    assert (np.diff(slots, axis=1) == 1).all()
