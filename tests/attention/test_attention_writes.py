"""Mistakes that were found in other engines, each pinned here."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_impls import ALL
from attention_oracle import Case, Geometry, make_case, relative_error, same_bits

from engine.attention import ragged_paged_attention

IMPLS = pytest.mark.parametrize("impl", ALL)


def run(case: Case, impl: str) -> tuple[np.ndarray, np.ndarray]:
    out, pool = ragged_paged_attention(case.q, case.k, case.v, jnp.array(case.pool), impl=impl, **case.arguments())
    return np.asarray(out), np.asarray(pool)


def assert_right(case: Case, impl: str) -> None:
    out, pool = run(case, impl)
    assert relative_error(out, case.expected_out()) <= 1e-5
    assert same_bits(pool, case.expected_pool())


@IMPLS
def test_windowed_prefill_writes_tokens_that_no_query_sees(impl: str) -> None:
    geometry = Geometry(window=16, page_size=16, columns=6, tokens=96, rows=1)
    assert_right(make_case(geometry, [96], [0], seed=21), impl)


@IMPLS
def test_zero_length_sequences_first_in_the_middle_and_last(impl: str) -> None:
    geometry = Geometry(rows=7, columns=4)
    assert_right(make_case(geometry, [0, 9, 0, 0, 1, 20, 0], [5, 3, 40, 0, 30, 2, 7], seed=22), impl)


@IMPLS
@pytest.mark.parametrize("page_size", [2, 16])
def test_pages_of_several_tokens_with_several_sequences(impl: str, page_size: int) -> None:
    geometry = Geometry(page_size=page_size, columns=64 // page_size, rows=4)
    assert_right(make_case(geometry, [11, 1, 7, 1], [17, 30, 0, 63], seed=23), impl)


@IMPLS
def test_an_idle_step_writes_nothing_and_answers_zero(impl: str) -> None:
    case = make_case(Geometry(), [0, 0, 0, 0], [5, 0, 9, 1], seed=24)
    out, pool = run(case.poisoned(), impl)
    assert not out.any()
    assert same_bits(pool, case.poisoned().pool)


@IMPLS
def test_padding_tokens_are_not_written_to_the_last_slot(impl: str) -> None:
    """Index -1 names the last row to NumPy-like scatters."""
    case = make_case(Geometry(), [3, 0, 0, 0], [0, 0, 0, 0], seed=25)
    case.pool[-1] = np.nan
    _, pool = run(case, impl)
    assert np.isnan(pool[-1]).all()


@IMPLS
def test_a_prefix_page_that_two_sequences_share_is_read_by_both(impl: str) -> None:
    case = make_case(Geometry(), [4, 1, 0, 0], [16, 20, 0, 0], seed=26)
    case.page_table[1, 0] = case.page_table[0, 0]
    keys, values = case.contexts[0][0][:16], case.contexts[0][1][:16]
    case.contexts[1][0][:16], case.contexts[1][1][:16] = keys, values
    assert_right(case, impl)
