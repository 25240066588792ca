import itertools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from attention_impls import ALL, FAST
from attention_oracle import Case, Geometry, make_case, relative_error, same_bits
from attention_strategies import GEOMETRIES, cases
from hypothesis import given, settings

from engine.attention import ragged_paged_attention

PLAIN = Geometry(page_size=16, columns=20, tokens=150, rows=4)


def attend(case: Case, impl: str, **changes: object) -> np.ndarray:
    arguments = {**case.arguments(), **changes}
    return np.asarray(ragged_paged_attention(case.q, case.k, case.v, jnp.array(case.pool), impl=impl, **arguments)[0])


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("name", ["gqa", "window", "everything_bf16"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_dead_slots_hold_never_reaches_an_output(name: str, impl: str, poison: float) -> None:
    """The null page, unowned pages, the tails of owned pages and the slots that this call overwrites."""

    @given(cases(GEOMETRIES[name]))
    @settings(max_examples=4)
    def check(case: Case) -> None:
        assert same_bits(attend(case.poisoned(poison), impl), attend(case, impl))

    check()


@pytest.mark.parametrize("impl", ALL)
def test_pages_before_the_window_may_be_gone(impl: str) -> None:
    geometry = Geometry(window=9, page_size=4, columns=40, tokens=30, rows=3)
    case = make_case(geometry, [1, 0, 20], [150, 60, 100], seed=11)
    gone = case.page_table.copy()
    pool = case.pool.copy()
    pool[:4] = np.nan
    for row, prefix in ((0, 150), (2, 100)):
        first_needed = (prefix - 9 + 1) // 4
        for page in gone[row, :first_needed]:
            pool[page * 4 : page * 4 + 4] = np.nan
        gone[row, :first_needed] = 0
    assert same_bits(attend(replace(case, pool=pool), impl, page_table=gone), attend(case, impl))


def alone(case: Case, row: int, impl: str) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of sequence ``row`` in the batch, and when it is the only one, in another row and place."""
    start, q_len = case.cu_q_lens[row], case.q_lens[row]
    others = np.random.default_rng(5)
    q, k, v = (others.standard_normal(array.shape).astype(array.dtype) for array in (case.q, case.k, case.v))
    for lone, full in ((q, case.q), (k, case.k), (v, case.v)):
        lone[:q_len] = full[start : start + q_len]
    rows = case.geometry.rows
    page_table = np.zeros_like(case.page_table)
    page_table[rows - 1] = case.page_table[row]
    kv_lens = np.zeros(rows, np.int32)
    kv_lens[rows - 1] = case.kv_lens[row]
    cu_q_lens = np.zeros(rows + 1, np.int32)
    cu_q_lens[rows] = q_len
    single = replace(case, q=q, k=k, v=v, page_table=page_table, kv_lens=kv_lens, cu_q_lens=cu_q_lens)
    return attend(case, impl)[start : start + q_len], attend(single, impl)[:q_len]


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("name", ["gqa", "d128_tiles", "everything_bf16"])
def test_a_result_does_not_depend_on_other_sequences_in_the_batch(name: str, impl: str) -> None:
    @given(cases(GEOMETRIES[name]))
    @settings(max_examples=4)
    def check(case: Case) -> None:
        for row in np.flatnonzero(case.q_lens):
            assert same_bits(*alone(case, int(row), impl))

    check()


@pytest.mark.parametrize("impl", FAST)
def test_poison_in_another_sequence_stays_there(impl: str) -> None:
    case = make_case(PLAIN, [70, 1, 0, 40], [20, 200, 3, 64], seed=12)
    clean = attend(case, impl)
    q = case.q.copy()
    q[70] = np.nan  # the decode row
    dirty = attend(replace(case, q=q), impl)
    assert np.isnan(dirty[70]).all()
    assert same_bits(np.delete(dirty, 70, axis=0), np.delete(clean, 70, axis=0))


def chunked(case: Case, cuts: list[int], impl: str) -> np.ndarray:
    """The outputs of the first sequence when its prompt arrives in chunks."""
    pool = jnp.array(case.pool)
    outs = []
    for start, end in itertools.pairwise(cuts):
        q, k, v = (np.roll(array, -start, axis=0) for array in (case.q, case.k, case.v))
        lengths = {
            "cu_q_lens": np.array([0] + [end - start] * case.geometry.rows, np.int32),
            "kv_lens": np.array([end] + [0] * (case.geometry.rows - 1), np.int32),
        }
        out, pool = ragged_paged_attention(q, k, v, pool, impl=impl, **{**case.arguments(), **lengths})
        outs.append(np.asarray(out)[: end - start])
    return np.concatenate(outs)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("geometry", [PLAIN, GEOMETRIES["everything_bf16"]])
def test_chunking_changes_no_bit_of_extended_tokens_and_little_of_decoded_ones(geometry: Geometry, impl: str) -> None:
    length = min(geometry.tokens, geometry.row_tokens)
    case = make_case(geometry, [length] + [0] * (geometry.rows - 1), [0] * geometry.rows, seed=13)
    whole = attend(case, impl)[:length]
    assert same_bits(chunked(case, [0, 17, 19, length - 2, length], impl), whole)
    # A chunk of one token takes the decode loop, whose matrix product has fewer rows and may sum in another order.
    tolerance = 2e-6 if geometry.dtype == "float32" else 8e-3
    assert relative_error(chunked(case, [0, 1, 2, length - 1, length], impl), whole) <= tolerance
