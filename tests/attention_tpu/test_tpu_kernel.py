from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tpu_cases import SMALL, check, make_step, oracle, run

from engine.attention.impl.tpu import tpu_step
from engine.attention.impl.tpu.block_sizes import BlockSizes
from engine.layer_groups import first_kept_page

MIXED = [(1, 5), (0, 40), (1, 300), (40, 170), (3, 3), (1, 129)]


@pytest.mark.parametrize("by_table", [True, False])
def test_mixed_step_equals_the_oracle_without_a_race_and_leaves_the_pool_bit_for_bit(by_table: bool) -> None:
    check(make_step(0, MIXED), races=True, by_table=by_table)


def test_new_rows_of_several_groups_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """More groups than buffers; the groups end within pages and within sequences."""
    monkeypatch.setattr(tpu_step, "FRESH_ROWS", 32)
    check(make_step(16, [(20, 90), (1, 5), (0, 40), (50, 50), (1, 17), (25, 40)]), races=True)


def test_contiguous_runs_read_the_same_as_scattered_pages() -> None:
    check(make_step(1, [(1, 20), (1, 600), (17, 520)], contiguous=True), races=True)


@pytest.mark.slow
def test_no_semaphore_is_left_over_where_every_copy_runs_at_once() -> None:
    check(make_step(12, MIXED), eager=True)


def test_short_extends_beside_decode_rows_and_whole_blocks() -> None:
    """A group of 16 makes the short kind of item, of 8 queries, within few rows."""
    blocks = dataclasses.replace(SMALL, prefill_queries=32)
    step = make_step(14, [(1, 5), (3, 140), (8, 300), (9, 60), (40, 170), (1, 129)], heads=1, group=16)
    check(step, races=True, blocks=blocks, return_lse=True)


def test_a_step_of_wild_page_ids_and_slots_touches_no_page_but_those_it_can_name() -> None:
    """The interpreter fails on an access outside an array; what another sequence owns stays as it is."""
    step = make_step(15, [(1, 5), (20, 170), (1, 129)])
    tokens = step.q.shape[0]
    wild = np.full_like(step.page_table, 2**31 - 1)
    wild[1] = -(2**31)
    slots = np.full(tokens, 2**31 - 1, np.int32)
    slots[1] = step.fused.shape[0] - 1  # the first of 20 rows that should lie together: there is room for one
    results = run(step, page_table=wild, slots=slots)
    changed = (results[1].view(np.uint16) != step.fused.view(np.uint16)).any((1, 2)).nonzero()[0]
    assert changed.tolist() == [step.fused.shape[0] - 1]


def test_window_sinks_and_lse() -> None:
    sinks = np.random.default_rng(2).standard_normal(8).astype(np.float32)
    check(make_step(2, MIXED), sliding_window=37, sinks=sinks, return_lse=True)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_no_key_are_zero_without_weight_and_write_nothing(sinks: bool) -> None:
    step = make_step(13, [(1, 20), (1, 40), (5, 60), (1, 33), (20, 70), (1, 9)])
    kv_lens = np.array([20, 0, 0, 33, 70, 0], np.int32)
    row = np.random.default_rng(0).standard_normal(8).astype(np.float32) if sinks else None
    check(dataclasses.replace(step, kv_lens=kv_lens), races=True, sinks=row, return_lse=True)


def test_windowed_prefill_writes_every_new_token() -> None:
    check(make_step(3, [(96, 96)]), sliding_window=16)


@pytest.mark.slow
def test_soft_cap() -> None:
    check(make_step(4, MIXED), soft_cap=3.0)


@pytest.mark.parametrize("window", [15, *(pytest.param(w, marks=pytest.mark.slow) for w in (1, 16, 33))])
def test_a_windowed_call_reads_no_page_but_those_of_its_windows(window: int) -> None:
    """What the page table names before a window may be anything, and all that no query can see is NaN."""
    rng = np.random.default_rng()
    q_lens, prefixes = [1, 1, window + 1, 3, 40], [window + 130, window, 16, 47 + window, 300]
    step = make_step(int(rng.integers(2**31)), [(n, n + p) for n, p in zip(q_lens, prefixes, strict=True)])
    clean = run(step, sliding_window=window)
    np.testing.assert_allclose(clean[0].astype(np.float64), oracle(step, sliding_window=window)[0], atol=2e-2)
    fused, table = np.full_like(step.fused, np.nan), step.page_table.copy()
    for row, prefix in enumerate(prefixes):
        behind = first_kept_page(window, prefix, 16)
        slots = (table[row, :, None] * 16 + np.arange(16)).reshape(-1)[behind * 16 : prefix]
        fused[slots] = step.fused[slots]
        table[row, :behind] = rng.choice([0, -7, 10**6, *table[1, :2]], behind)
    dirty = run(dataclasses.replace(step, fused=fused), sliding_window=window, page_table=table)
    np.testing.assert_array_equal(dirty[0].view(np.uint16), clean[0].view(np.uint16))
    expected = oracle(dataclasses.replace(step, fused=fused))[2]
    np.testing.assert_array_equal(dirty[1].view(np.uint8), expected.view(np.uint8))


def test_scales_of_an_fp8_cache_are_runtime_arrays_a_head() -> None:
    step = make_step(5, [(1, 7), (1, 200), (20, 150)], heads=2, dtype=jnp.float8_e4m3fn, page_size=32)
    check(step, k_scale=np.array([0.7, 2.1], np.float32), v_scale=np.array([1.3, 0.3], np.float32))


def test_float32_keeps_float32_accuracy() -> None:
    check(make_step(6, MIXED, dtype=jnp.float32), return_lse=True)


@pytest.mark.slow
def test_a_step_of_padding_rows_only_changes_nothing() -> None:
    check(make_step(7, [(0, 40), (0, 0)]))


@pytest.mark.slow
def test_head_dims_and_groups_that_do_not_fill_registers() -> None:
    check(make_step(8, [(1, 9), (5, 40)], heads=1, group=7, head_dim=80))


@pytest.mark.slow
def test_wide_head_dim() -> None:
    check(make_step(9, [(1, 9), (5, 40)], heads=2, group=2, head_dim=256))


@pytest.mark.slow
def test_positions_past_32767() -> None:
    check(make_step(10, [(1, 5), (1, 33_000), (20, 33_100)], heads=1, page_size=128))


def blocks_of(page_size: int, queries: int) -> BlockSizes:
    """Small blocks: computed are the fewest pages that fill whole registers of 128 tokens, fetched twice as many."""
    chunk = math.lcm(128, page_size) // page_size
    return BlockSizes(2 * chunk, chunk, queries, 2 * chunk, chunk)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=20)
@given(data=st.data())
def test_any_step_equals_the_oracle(data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from([16, 24, 32, 48, 64, 128, 256]))
    edges = [0, 1, page_size - 1, page_size, page_size + 1, 127, 128, 129, 255, 256, 257, 500]
    seqs = [(1, 3)]
    for _ in range(data.draw(st.integers(1, 4))):
        kv_len = data.draw(st.sampled_from(edges))
        seqs.append((min(kv_len, data.draw(st.sampled_from([0, 1, 2, 15, 16, 17, 60]))), kv_len))
    heads, group = data.draw(st.sampled_from([(1, 1), (3, 1), (2, 3), (1, 4), (2, 4), (1, 8), (2, 7), (1, 16)]))
    dtype = data.draw(st.sampled_from([jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.float8_e5m2]))
    queries = 32 if group == 16 else 16  # of 16 query heads, 8 queries are a short extend
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    scales = {name: 2 ** rng.uniform(-1, 0.5, heads).astype(np.float32) for name in ("k_scale", "v_scale")}
    step = make_step(
        data.draw(st.integers(0, 1 << 30)),
        seqs,
        heads=heads,
        group=group,
        head_dim=data.draw(st.sampled_from([64, 80, 96, 128, 192, 256])),
        page_size=page_size,
        dtype=dtype,
        contiguous=data.draw(st.booleans()),
    )
    check(
        step,
        races=True,
        blocks=blocks_of(page_size, queries),
        sliding_window=data.draw(st.sampled_from([None, 1, 16, 100])),
        soft_cap=data.draw(st.sampled_from([None, 3.0])),
        sinks=rng.standard_normal(heads * group).astype(np.float32) if data.draw(st.booleans()) else None,
        return_lse=data.draw(st.booleans()),
        by_table=data.draw(st.booleans()),
        **scales if jnp.dtype(dtype).itemsize == 1 else {},
    )


def test_the_oracle_itself_knows_one_token() -> None:
    step = make_step(11, [(1, 1)], padding=0)
    out, _, _ = oracle(step)
    np.testing.assert_array_equal(out[0], np.repeat(step.v[0].astype(np.float64), 4, axis=0))
