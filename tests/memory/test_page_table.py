"""What each call of the page table returns and refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError, DoubleFreeError, IntegrityError, KVPoolExhausted, ShapeError
from engine.memory.rows import ReqToTokenPool

PAGE = 4


@pytest.fixture
def table() -> ReqToTokenPool:
    return ReqToTokenPool(max_requests=3, max_context_tokens=18, page_size=PAGE)


def contents(table: ReqToTokenPool) -> tuple[object, ...]:
    return table._table.tolist(), table._granted.tolist(), table._in_use.tolist(), list(table._free_rows)


def refuses(table, error, call, match=None):
    before = contents(table)
    with pytest.raises(error, match=match) as caught:
        call()
    assert contents(table) == before, "a refused call changed something"
    return caught.value


def slots_in(pages: list[int], start: int, stop: int) -> np.ndarray:
    positions = np.arange(start, stop)
    return np.array(pages)[positions // PAGE] * PAGE + positions % PAGE


def grow(table, row, pages, start, stop):
    table.write_slots([row], [start], [stop - start], slots_in(pages, start, stop))


def test_a_row_grows_token_by_token_across_pages(table):
    row, pages = table.alloc_row(), [7, 3, 9]
    for position in range(10):
        grow(table, row, pages, position, position + 1)
        table.check_integrity()
        assert table.kv_lens([row]).tolist() == [position + 1]
        assert table.row_pages(row).tolist() == pages[: position // PAGE + 1]
    assert table.slots(row, 0, 10).tolist() == slots_in(pages, 0, 10).tolist()
    assert table.slots(row, 3, 6).tolist() == [31, 12, 13]
    assert table.rows([row]).tolist() == [[7, 3, 9, 0, 0]]


def test_many_rows_grow_in_one_call(table):
    a, b, c = table.alloc_rows(3)
    grow(table, b, [5], 0, 3)
    slots = np.concatenate([slots_in([2, 8], 0, 5), slots_in([5, 6], 3, 5)])
    table.write_slots([a, c, b], [0, 0, 3], [5, 0, 2], slots)
    assert table.rows([a, b, c]).tolist() == [[2, 8, 0, 0, 0], [5, 6, 0, 0, 0], [0] * 5]
    assert table.kv_lens([a, b, c]).tolist() == [5, 5, 0]
    assert table.last_loc([a, b, c], [5, 4, 0]).tolist() == [32, 23, -1]
    assert table.last_loc([a, b, c], [5, 4, 0]).dtype == np.int32


def test_a_prefix_hit_comes_as_full_pages(table):
    row = table.alloc_row()
    table.append_pages(row, [6, 2])
    assert table.kv_lens([row]).tolist() == [8]
    grow(table, row, [6, 2, 1], 8, 9)
    assert table.row_pages(row).tolist() == [6, 2, 1]
    refuses(table, ShapeError, lambda: table.append_pages(row, [9]), "partial page")


def test_release_gives_the_pages_back_and_clears_the_row(table):
    row = table.alloc_row()
    grow(table, row, [7, 3], 0, 6)
    pages = table.release(row)
    assert pages.tolist() == [7, 3]
    assert pages.dtype == np.int32
    assert not table._table.any()
    table.check_integrity()
    rows = table.alloc_rows(3)
    assert rows[-1] == row
    assert table.row_pages(row).size == 0


@pytest.mark.parametrize("row", [0, -1, 3, 10**9])
def test_a_row_that_no_request_has_is_not_released(table, row):
    table.release(table.alloc_row())
    refuses(table, DoubleFreeError, lambda: table.release(row), "no request has it")


def test_what_is_returned_shares_no_memory_with_the_table(table):
    row = table.alloc_row()
    grow(table, row, [7, 3], 0, 8)
    for array in (table.rows([row]), table.row_pages(row), table.kv_lens([row]), table.held_pages()):
        array[...] = 99
    assert table.rows([row]).tolist() == [[7, 3, 0, 0, 0]]
    assert table.kv_lens([row]).tolist() == [8]


def test_too_many_requests_are_refused(table):
    table.alloc_row()
    error = refuses(table, KVPoolExhausted, lambda: table.alloc_rows(3), "3 page-table rows: 2 of 3")
    assert (error.requested, error.available) == (54, 36)
    refuses(table, ShapeError, lambda: table.alloc_rows(-1))
    assert table.alloc_rows(0).tolist() == []
    assert table.available_rows == 2


def test_a_row_does_not_outgrow_the_context(table):
    row = table.alloc_row()
    refuses(table, ShapeError, lambda: grow(table, row, [1, 2, 3, 4, 5], 0, 19), "max_context_tokens is 18")
    refuses(table, ShapeError, lambda: table.append_pages(row, [1, 2, 3, 4, 5]), "max_context_tokens is 18")
    refuses(table, ShapeError, lambda: table.write_slots([row], [0], [2**62], []), "max_context_tokens is 18")
    grow(table, row, [1, 2, 3, 4, 5], 0, 18)
    refuses(table, ShapeError, lambda: grow(table, row, [1, 2, 3, 4, 5], 18, 19), "max_context_tokens is 18")


@pytest.mark.parametrize(
    ("starts", "lens", "slots"),
    [
        ([5], [1], [25]),
        ([7], [1], [28]),
        ([-1], [1], [28]),
        ([6], [-1], []),
        ([6], [2], [14]),
        ([6], [1], [15]),
        ([6], [1], [18]),
        ([6], [1], [-2]),
        ([6], [3], [14, 15, 3]),
        ([6], [3], [14, 15, 0]),
        ([6], [4], [14, 15, 20, 25]),
        ([6], [3], [14, 15, -4]),
        ([6], [3], [14, 15, 2**33]),
        ([6, 6], [1, 1], [14, 14]),
        ([6], [1], [14.0]),
        ([6], [1], [[14]]),
    ],
)
def test_slots_that_do_not_continue_the_row_are_refused(table, starts, lens, slots):
    row = table.alloc_row()
    grow(table, row, [7, 3], 0, 6)
    refuses(table, ShapeError, lambda: table.write_slots([row] * len(starts), starts, lens, slots))
    grow(table, row, [7, 3, 5], 6, 9)


def test_one_new_page_is_not_given_to_two_rows(table):
    rows = table.alloc_rows(2)
    refuses(table, ShapeError, lambda: table.write_slots(rows, [0, 0], [1, 1], [8, 8]), "begins twice")
    refuses(table, ShapeError, lambda: table.append_pages(rows[0], [2, 2]), "begins twice")


@pytest.mark.parametrize("pages", [[0], [-1], [4, 7], [2**31], [1.5], [[1], [2]], [7, 3]])
def test_pages_that_cannot_be_appended_are_refused(table, pages):
    row = table.alloc_row()
    table.append_pages(row, [7])
    refuses(table, ShapeError, lambda: table.append_pages(row, pages))


@pytest.mark.parametrize("row", [-1, 1, 3])
def test_rows_out_of_use_are_refused_everywhere(table, row):
    table.alloc_row()
    for call in (lambda: table.rows([0, row]), lambda: table.kv_lens([row]), lambda: table.row_pages(row),
                 lambda: table.slots(row, 0, 0), lambda: table.last_loc([row], [0]),
                 lambda: table.append_pages(row, [1]), lambda: table.write_slots([row], [0], [1], [4])):  # fmt: skip
        refuses(table, ShapeError, call)


def test_tokens_that_a_row_lacks_are_refused(table):
    row = table.alloc_row()
    grow(table, row, [7, 3], 0, 6)
    for start, stop in ((0, 7), (-1, 2), (4, 3)):
        refuses(table, ShapeError, lambda start=start, stop=stop: table.slots(row, start, stop), "counted from 0")
    for length in (7, -1):
        refuses(table, ShapeError, lambda length=length: table.last_loc([row], [length]), "no token")


@pytest.mark.parametrize("sizes", [(0, 18, 4), (3, 0, 4), (3, 18, 0), (3, 18.0, 4), (-1, 18, 4)])
def test_a_table_that_cannot_be_is_refused(sizes):
    with pytest.raises(ConfigError):
        ReqToTokenPool(*sizes)


@pytest.mark.parametrize(
    "harm",
    [
        lambda table: table._table.__setitem__((1, 0, 1), 0),
        lambda table: table._table.__setitem__((1, 0, 2), 5),
        lambda table: table._table.__setitem__((1, 0, 0), -7),
        lambda table: table._granted.__setitem__(1, 9),
        lambda table: table._in_use.__setitem__(1, False),
        lambda table: table._free_rows.append(1),
    ],
)
def test_check_integrity_names_the_wrong_row(table, harm):
    rows = table.alloc_rows(2)
    grow(table, rows[1], [7, 3], 0, 6)
    table.check_integrity()
    harm(table)
    with pytest.raises(IntegrityError, match="row 1 "):
        table.check_integrity()


@settings(max_examples=60)
@given(data=st.data())
def test_growing_by_pages_is_growing_by_slots(data):
    """The same rows twice: from slots, and from pages alone; and a copy that hears of new pages only."""
    by_slots, by_pages = (ReqToTokenPool(max_requests=3, max_context_tokens=18, page_size=PAGE) for _ in range(2))
    copy, fresh = np.zeros((3, by_pages.max_pages), np.int32), iter(range(1, 1000))
    for table in (by_slots, by_pages):
        assert table.alloc_rows(3).tolist() == [0, 1, 2]
    for _ in range(data.draw(st.integers(1, 12))):
        rows = data.draw(st.permutations([0, 1, 2]))[: data.draw(st.integers(1, 3))]
        starts = by_slots.kv_lens(rows)
        counts = [data.draw(st.integers(0, 18 - int(start))) for start in starts]
        growth = by_pages.plan_growth(rows, counts)
        pages = np.array([next(fresh) for _ in range(growth.num_pages)], np.int32)
        by_pages.grow(growth, pages)
        slots = [by_pages.slots(row, int(s), int(s) + n) for row, s, n in zip(rows, starts, counts, strict=True)]
        by_slots.write_slots(rows, starts, counts, np.concatenate(slots))
        assert contents(by_slots) == contents(by_pages)
        by_pages.check_integrity()
        places, new = by_pages.take_new_pages(rows)
        assert sorted(new.tolist()) == sorted(pages.tolist())
        copy.reshape(-1)[places] = new
        np.testing.assert_array_equal(copy, by_pages.rows([0, 1, 2]))
        assert by_pages.take_new_pages(rows)[0].size == 0


def test_a_row_of_another_request_sends_all_its_page_ids_again(table):
    row = table.alloc_row()
    table.append_pages(row, [3, 5])
    assert table.take_new_pages([row])[1].tolist() == [3, 5]
    table.release(row)
    while (again := table.alloc_row()) != row:
        pass
    table.append_pages(again, [5, 7])
    places, pages = table.take_new_pages([again])
    assert (places.tolist(), pages.tolist()) == ([row * table.max_pages, row * table.max_pages + 1], [5, 7])


def test_a_growth_that_does_not_fit_changes_nothing(table):
    a, b, _ = table.alloc_rows(3)
    table.append_pages(a, [3])
    for rows, counts, message in (
        ([a, a], [1, 1], "more than once"),
        ([a], [1, 1], "different lengths"),
        ([a], [-1], "cannot grow by -1 tokens"),
        ([b, a], [1, 15], "cannot grow to 19 tokens"),
        ([9], [1], "rows go from 9"),
    ):
        refuses(table, ShapeError, lambda rows=rows, counts=counts: table.plan_growth(rows, counts), message)
    growth = table.plan_growth([a, b], [2, 5])
    assert growth.runs.tolist() == [1, 2]
    for pages, message in (([1, 2], "2 pages for 3"), ([1, 2, 2], "begins twice"), ([0, 1, 2], "null page")):
        refuses(table, ShapeError, lambda pages=pages: table.grow(growth, np.array(pages, np.int32)), message)
    table.grow(table.plan_growth([b], 1), np.array([9], np.int32))
    refuses(table, ShapeError, lambda: table.grow(growth, np.array([1, 2, 4], np.int32)), "have changed")


@settings(max_examples=200)
@given(data=st.data())
def test_every_page_is_told_once_whichever_rows_are_asked_about_in_between(data):
    """Steps of decoding over arrays of rows, with looks at other rows and pages replaced between grow and telling."""
    table, fresh = ReqToTokenPool(max_requests=3, max_context_tokens=40, page_size=2), iter(range(1, 1000))
    table.alloc_rows(3)
    copy = np.zeros((3, table.max_pages), np.int32)
    for _ in range(data.draw(st.integers(1, 15))):
        rows = np.array(data.draw(st.sampled_from([[0], [1], [0, 1], [1, 0, 2], [0, 1, 2]])), np.int32)
        action = data.draw(st.sampled_from(["grow", "grow", "tell", "look", "replace"]))
        if action == "grow" and table.kv_lens(rows).max() < 39:
            growth = table.plan_growth(rows, data.draw(st.sampled_from([1, 1, [2] * len(rows)])))
            table.grow(growth, np.array([next(fresh) for _ in range(growth.num_pages)], np.int32))
        elif action == "look":
            table.mark_computed(rows, table.kv_lens(rows))
        elif action == "replace" and table.kv_len(int(rows[0])) > 2:
            table.replace_pages(int(rows[0]), np.array([0]), np.array([0]), np.array([next(fresh)], np.int32))
        elif action == "tell":
            places, pages = table.take_new_pages(rows)
            assert set((places // table.max_pages).tolist()) <= set(rows.tolist())
            copy.reshape(-1)[places] = pages
            np.testing.assert_array_equal(copy[rows], table.rows(rows))
            assert table.take_new_pages(rows)[0].size == 0
    table.take_new_pages([0])  # a list is looked at anew each time
    places, pages = table.take_new_pages([0, 1, 2])
    copy.reshape(-1)[places] = pages
    np.testing.assert_array_equal(copy[1:], table.rows([1, 2]))
    table.check_integrity()
