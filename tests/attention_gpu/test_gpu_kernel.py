"""The GPU kernels in the interpreter against float64, with races looked for and all dead memory NaN."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from gpu_cases import HOPPER_CASES, NEEDS_MOSAIC, check, geometry, make_case, same_bits

from engine.layer_groups import first_kept_page

pytestmark = NEEDS_MOSAIC


@pytest.mark.parametrize("name", HOPPER_CASES)
def test_it_computes_attention(name: str) -> None:
    geo, q_lens, prefix_lens = HOPPER_CASES[name]
    check(make_case(geo, q_lens, prefix_lens, seed=np.random.default_rng().integers(2**31)))


@pytest.mark.parametrize("logit_scale", [0.25, 3.0])
def test_a_traced_scale_is_taken_into_the_logits(logit_scale: float) -> None:
    check(make_case(geometry(tokens=40, rows=2), [1, 33], [90, 10], seed=3), logit_scale=logit_scale)


@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_however_many_blocks_share_the_chunks(blocks: int) -> None:
    check(make_case(geometry(tokens=4), [1, 1, 1, 1], [319, 0, 200, 64], seed=blocks), blocks=blocks)


def test_a_prefilled_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    geo = geometry(tokens=140, rows=3)
    alone, batched = (
        make_case(geo, q_lens, prefix, seed=1)
        for q_lens, prefix in (([130, 0, 0], [60, 0, 0]), ([130, 5, 1], [60, 77, 200]))
    )
    assert same_bits(alone.contexts[0], batched.contexts[0])
    assert same_bits(check(alone)[0][:130], check(batched)[0][:130])


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(48, 4), (5, 1), pytest.param(64, 1, marks=pytest.mark.slow)])
def test_groups_of_any_size(q_heads: int, kv_heads: int) -> None:
    geo = geometry(tokens=9, rows=2, columns=8, q_heads=q_heads, kv_heads=kv_heads)
    check(make_case(geo, [1, 5], [90, 60], seed=q_heads))


def test_wide_integers_and_strict_promotion_change_nothing() -> None:
    case = make_case(geometry(tokens=40, rows=3, columns=8), [1, 20, 3], [90, 10, 60], seed=1)
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        check(case)


def test_what_a_table_names_past_a_context_is_of_no_account() -> None:
    case = make_case(geometry(tokens=40, rows=3), [1, 33, 0], [90, 10, 0], seed=5)
    table = case.page_table.copy()
    for row, kv_len in enumerate(case.kv_lens):
        table[row, -(-kv_len // 16) :] = (-7, 10_000)[row % 2]
    check(case, table=table)


@pytest.mark.parametrize("window", [1, 15, 16, 33])
def test_a_windowed_call_reads_no_page_but_those_of_its_windows(window: int) -> None:
    """What the page table names before a window may be anything, and all that no query can see is NaN."""
    prefixes = [window + 130, window, 0, 250]
    case = make_case(geometry(tokens=80, window=window), [1, 1, window + 1, 40], prefixes, seed=window)
    pool, table = case.pool.copy(), case.page_table.copy()
    for row, prefix in enumerate(prefixes):
        behind = first_kept_page(window, prefix, 16)
        pool[(table[row, :behind, None] * 16 + np.arange(16)).ravel()] = np.nan
        table[row, :behind] = (0, -7, 10_000, table[0, -1])[row]
    check(dataclasses.replace(case, pool=pool), table=table)
