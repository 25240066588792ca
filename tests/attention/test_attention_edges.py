"""Edges where other kernels were wrong: few new tokens across pages, window edges, pairs of dtypes, narrow tables."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_impls import FAST
from attention_oracle import DTYPES, Geometry, make_case, relative_error, same_bits

from engine.attention import ragged_paged_attention

# As in test_attention_values: what the output's own rounding spends of 24, 8 and 11 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
PAGES_OF_FOUR = Geometry(q_heads=4, page_size=4, columns=12, tokens=36)
WINDOW = 8


def any_seed():
    return int(np.random.default_rng().integers(2**31))


def check(case, impl):
    out, pool = ragged_paged_attention(case.q, case.k, case.v, jnp.array(case.pool), impl=impl, **case.arguments())
    assert relative_error(out, case.expected_out()) <= TOLERANCE[case.geometry.dtype]
    assert same_bits(np.asarray(pool), case.expected_pool())


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("q_len", range(2, 9))
def test_two_to_eight_new_tokens_across_pages(q_len, impl):
    """From each offset of a page on, as for the tokens that speculation proposes."""
    check(make_case(PAGES_OF_FOUR, [q_len] * 4, [4, 5, 6, 7], seed=any_seed()).poisoned(), impl)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("chunk", [WINDOW - 1, WINDOW, WINDOW + 1])
@pytest.mark.parametrize("before", [WINDOW - 1, WINDOW, WINDOW + 1])
def test_window_edges_in_chunks(before, chunk, impl):
    geometry = Geometry(q_heads=4, page_size=4, columns=12, tokens=36, window=WINDOW)
    seed = any_seed()
    check(make_case(geometry, [chunk, 1, chunk, 1], [before, before, 0, before + chunk], seed).poisoned(), impl)


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_every_pair_of_kv_and_cache_dtype(dtype, cache_dtype):
    geometry = Geometry(q_heads=4, tokens=16, columns=3, dtype=dtype, cache_dtype=cache_dtype)
    check(make_case(geometry, [5, 1, 0, 9], [10, 33, 4, 0], seed=any_seed()), "xla")


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("columns", [1, 3, 7])
def test_page_tables_of_one_three_and_seven_columns(columns, impl):
    geometry = Geometry(q_heads=4, page_size=8, columns=columns, tokens=24)
    full = geometry.row_tokens
    check(make_case(geometry, [1, 8, 0, 3], [full - 1, full - 8, 0, 0], seed=any_seed()).poisoned(), impl)
