"""Layers with a window at the edges of window, page and chunk, with nothing but the window's own pages to read."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from attention_impls import ALL
from attention_oracle import Case, Geometry, make_case, relative_error, same_bits

from engine.attention import ragged_paged_attention
from engine.layer_groups import first_kept_page

PAGE, COLUMNS, ROWS = 8, 24, 6


def edge_case(rng: np.random.Generator, window: int, **changes: object) -> Case:
    """Sequences whose chunks and contexts end around the edges of the window and of pages."""
    around = [edge + off for edge in (window, PAGE, 2 * PAGE, window + 3 * PAGE) for off in (-1, 0, 1)]
    q_lens = [1, *rng.choice([n for n in around if n > 0], ROWS - 2).tolist(), 0]
    prefixes = rng.choice([max(n, 0) for n in around] + [0, 5 * PAGE, 9 * PAGE + 3], ROWS).tolist()
    prefixes[0] = window + int(rng.integers(2 * PAGE))
    geometry = Geometry(
        window=window, page_size=PAGE, columns=COLUMNS, rows=ROWS, tokens=sum(q_lens) + 3, head_dim=32, **changes
    )
    return make_case(geometry, q_lens, prefixes, seed=int(rng.integers(2**31)))


def attend(case: Case, impl: str, **changes: object) -> tuple[np.ndarray, np.ndarray]:
    arguments = {**case.arguments(), **changes}
    out, pool = ragged_paged_attention(case.q, case.k, case.v, jnp.array(case.pool), impl=impl, **arguments)
    return np.asarray(out), np.asarray(pool)


def left_behind(case: Case) -> list[int]:
    """Of each sequence, how many pages no query of the call can see."""
    window = case.geometry.window
    return [first_kept_page(window, prefix, PAGE) if q_len else COLUMNS for q_len, prefix in
            zip(case.q_lens, case.prefix_lens, strict=True)]  # fmt: skip


def poisoned(case: Case) -> Case:
    """The same call where all but the tokens that some query can see, and nothing else in the pool, is NaN."""
    pool = np.full_like(case.pool, np.nan)
    for row, behind in enumerate(left_behind(case)):
        for position in range(behind * PAGE, case.prefix_lens[row]):
            pool[case.slot(row, position)] = case.pool[case.slot(row, position)]
    return replace(case, pool=pool)


def tables(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Page tables that differ in what stands before the windows and after the last pages."""
    beyond = np.ones((ROWS, COLUMNS), bool)
    for row, behind in enumerate(left_behind(case)):
        beyond[row, behind : -(-int(case.kv_lens[row]) // PAGE)] = False
    others = rng.integers(0, case.geometry.pages, beyond.shape)
    return {
        "its own pages": case.page_table,
        "the null page": np.where(beyond, 0, case.page_table),
        "pages of others": np.where(beyond, others, case.page_table).astype(np.int32),
        "no pages": np.where(beyond, rng.choice([-7, 10**6], beyond.shape), case.page_table).astype(np.int32),
    }


@pytest.mark.parametrize("window", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 5])
@pytest.mark.parametrize("impl", ALL)
def test_a_windowed_call_reads_no_page_but_those_of_its_windows(impl: str, window: int) -> None:
    rng = np.random.default_rng()
    case = edge_case(rng, window, sinks=bool(rng.integers(2)))
    clean, written = attend(case, impl)
    assert relative_error(clean, case.expected_out()) < 1e-5
    assert same_bits(written, case.expected_pool())
    dirty = poisoned(case)
    for name, table in tables(case, rng).items():
        out, pool = attend(dirty, impl, page_table=table)
        assert same_bits(out, clean), name
        assert same_bits(pool, dirty.expected_pool()), name


@pytest.mark.parametrize("impl", ALL)
def test_every_token_that_a_later_query_can_see_is_written_by_chunks_longer_than_the_window(impl: str) -> None:
    window, length = PAGE + 3, 20 * PAGE + 5
    geometry = Geometry(window=window, page_size=PAGE, columns=COLUMNS, rows=1, tokens=length, head_dim=32)
    case = make_case(geometry, [length], [0], seed=int(np.random.default_rng().integers(2**31)))
    pool, start, outs = jnp.array(case.pool), 0, []
    for end in (3 * window, 3 * window + 1, 9 * PAGE, 14 * PAGE - 1, length):
        q, k, v = (np.roll(array, -start, axis=0) for array in (case.q, case.k, case.v))
        lengths = {"cu_q_lens": np.array([0, end - start], np.int32), "kv_lens": np.array([end], np.int32)}
        out, pool = ragged_paged_attention(q, k, v, pool, impl=impl, **{**case.arguments(), **lengths})
        outs.append(np.asarray(out)[: end - start])
        start = end
    assert same_bits(pool, case.expected_pool())
    assert relative_error(np.concatenate(outs), case.expected_out()) < 1e-5
