from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_cases import SMALL

from engine.attention import AttentionMetadata
from engine.attention.impl.tpu import block_sizes
from engine.attention.impl.tpu.block_sizes import (
    OVERRIDE_KEYS,
    VMEM_BYTES,
    VMEM_SHARE,
    BlockSizes,
    choose_blocks,
    load_overrides,
    make_tiles,
    run_pages,
)
from engine.attention.impl.tpu.contract.geometry import Geometry
from engine.attention.impl.tpu.contract.step_plan import Schedule, plan_parts
from engine.attention.impl.tpu.schedule import make_schedule
from engine.attention.impl.tpu.tpu_step import make_geometry, ragged_paged_attention_tpu, scratch_bytes
from engine.attention.options import AttentionOptions, HeadArrays
from engine.errors import BackendUnsupported, ConfigError


@pytest.mark.parametrize("generation", VMEM_BYTES)
@pytest.mark.parametrize("page_size", [16, 32, 48, 64, 128, 256])
@pytest.mark.parametrize(
    ("heads", "group", "lanes"), [(8, 4, 128), (1, 8, 128), (32, 1, 128), (8, 2, 256), (1, 7, 128)]
)
def test_scratch_fits_vmem_and_blocks_nest(generation: str, page_size: int, heads: int, group: int, lanes: int) -> None:
    words = 1 << (heads - 1).bit_length() if heads <= 8 else heads
    blocks = choose_blocks(
        generation=generation, heads=heads, group=group, lanes=lanes, dtype="bfloat16",
        page_size=page_size, longest=32_768,
    )  # fmt: skip
    assert blocks.decode_fetch_pages % blocks.decode_chunk_pages == 0
    assert blocks.prefill_fetch_pages % blocks.prefill_chunk_pages == 0
    assert blocks.decode_chunk_pages * page_size % 128 == 0
    assert blocks.prefill_chunk_pages * page_size % 128 == 0
    runs = run_pages(page_size, blocks)
    assert blocks.decode_fetch_pages % runs == 0 == blocks.prefill_fetch_pages % runs
    io = jnp.dtype(jnp.float32 if group % 2 else jnp.bfloat16)
    geo = Geometry(
        heads=heads, group=group, lanes=lanes, words=words, q_words=heads * group * lanes // 128 * io.itemsize // 4,
        page_size=page_size, run_pages=runs, table_pages=2048, plan_rows=8, q_scale=1.0, fresh_tokens=0,
        kv_dtype=jnp.dtype(jnp.bfloat16), compute_dtype=jnp.dtype(jnp.bfloat16), io_dtype=io, soft_cap=None,
        window=None, has_lse=False, interpret=False, tiles=make_tiles(blocks, group, page_size),
    )  # fmt: skip
    used = scratch_bytes(geo)
    assert used < 0.9 * VMEM_BYTES[generation], f"{used >> 20} MiB"


@pytest.mark.parametrize(
    ("heads", "lanes", "dtype", "page_size", "fits"),
    [
        (32, 128, "float32", 16, True),
        (8, 256, "float32", 128, True),
        (16, 256, "bfloat16", 128, True),
        (8, 128, "bfloat16", 250, False),  # the least common multiple with 128 is 16,000 tokens
        (64, 256, "float32", 128, False),
    ],
)
def test_blocks_shrink_for_wide_tokens_and_are_refused_where_even_the_smallest_do_not_fit(
    heads: int, lanes: int, dtype: str, page_size: int, fits: bool
) -> None:
    like = jax.ShapeDtypeStruct
    q, kv = like((256, heads, lanes), jnp.bfloat16), like((64 * page_size, 2 * heads, lanes), jnp.dtype(dtype))
    call = functools.partial(
        make_geometry, q, heads, kv, AttentionOptions(page_size, 1.0), (1, 32_768 // page_size), generation="v7x"
    )
    if fits:
        used = scratch_bytes(call())
        assert used < 0.9 * VMEM_BYTES["v7x"], f"{used >> 20} MiB"
    else:
        with pytest.raises(BackendUnsupported, match=r"bytes of VMEM of 60,.* on v7x"):
            call()


@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", 1024), ("float32", 512)])
def test_blocks_of_queries_shrink_where_log_sum_exp_would_leave_the_compiler_too_little(dtype: str, rows: int) -> None:
    like = jax.ShapeDtypeStruct
    q, kv = like((1024, 32, 128), jnp.dtype(dtype)), like((8192, 16, 128), jnp.dtype(dtype))
    plain, lse = (
        make_geometry(q, 8, kv, AttentionOptions(128, 1.0, return_lse=wanted), (1, 32), generation="v7x")
        for wanted in (False, True)
    )
    assert (plain.tiles[-1].rows, lse.tiles[-1].rows) == (1024, rows)
    assert scratch_bytes(lse) <= VMEM_BYTES["v7x"] * VMEM_SHARE


def geometry(blocks: BlockSizes, group: int, tokens: int = 1024) -> Geometry:
    q = jax.ShapeDtypeStruct((tokens, group, 128), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1024, 2, 128), jnp.bfloat16)
    return make_geometry(q, 1, kv, AttentionOptions(16, 1.0), (6, 10), generation="v6e", blocks=blocks)


def parts_of(geo: Geometry, schedule: Schedule) -> SimpleNamespace:
    """The parts of a schedule's plan, as arrays of their own."""
    plan = np.asarray(schedule.plan)
    parts = plan_parts(geo.plan_rows, plan.size)
    return SimpleNamespace(**{name: plan[part.start : part.stop] for name, part in parts.items()})


@pytest.mark.parametrize("group", [1, 16])
def test_items_cover_every_new_token_once_each_in_the_smallest_kind_that_holds_it(group: int) -> None:
    geo = geometry(dataclasses.replace(SMALL, prefill_queries=32), group)
    sizes = [tile.queries for tile in geo.tiles]
    assert sizes == ([1, 8, 32] if group == 16 else [1, 32])
    rng = np.random.default_rng(0)
    for _ in range(20):
        q_lens = rng.choice([0, 1, 2, 7, 8, 9, 32, 33, 70], size=6)
        kv_lens = (q_lens + rng.integers(0, 50, 6)).astype(np.int32)
        cu = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        table = rng.permutation(60).reshape(6, 10).astype(np.int32)
        slots = np.zeros(6 * 70, np.int32)
        plan = parts_of(geo, make_schedule(geo, AttentionMetadata(table, cu, kv_lens, slots, slots), cache_pages=64))
        tokens: list[int] = []
        assert not plan.counts[len(sizes) :].any()
        kinds = np.repeat(np.arange(len(sizes)), plan.counts[: len(sizes)])
        for kind, seq, first in zip(kinds, plan.item_seq, plan.item_token, strict=False):
            assert kind == next(at for at, size in enumerate(sizes) if q_lens[seq] <= size or size == sizes[-1])
            tokens += range(int(first), min(int(first) + sizes[kind], int(cu[seq + 1])))
        assert sorted(tokens) == list(range(cu[-1]))


def test_no_item_has_more_queries_than_the_step() -> None:
    assert [geometry(SMALL, 4, tokens).tiles[-1].queries for tokens in (1, 8, 9, 16, 17)] == [8, 8, 16, 16, 16]


def test_a_schedule_names_nothing_outside_its_arrays_whatever_the_step_holds() -> None:
    geo = geometry(SMALL, 4)
    rng = np.random.default_rng(1)
    for _ in range(20):
        arrays = (rng.integers(-(2**31), 2**31, shape, np.int32) for shape in ((6, 10), 7, 6, 40, 40))
        schedule = make_schedule(geo, AttentionMetadata(*arrays), cache_pages=64)
        plan = parts_of(geo, schedule)
        assert 0 <= int(schedule.table.min()) <= int(schedule.table.max()) < 64
        assert 0 <= int(plan.kv_lens.min()) <= int(plan.kv_lens.max()) <= 10 * 16
        assert int(schedule.slots.max()) < 64 * 16
        assert 0 <= int(plan.cu_q_lens[0]) <= int(plan.cu_q_lens[-1]) <= 40
        items = int(plan.counts.sum())
        assert items <= plan.item_seq.shape[0]
        assert (np.diff(plan.cu_q_lens) >= 0).all()
        assert (plan.cu_q_lens[plan.item_seq] <= plan.item_token)[:items].all()
        assert (plan.item_token < plan.cu_q_lens[plan.item_seq + 1])[:items].all()


def test_a_shorter_usual_context_takes_smaller_decode_chunks() -> None:
    shape = {"generation": "v6e", "heads": 8, "group": 4, "lanes": 128, "dtype": "bfloat16", "page_size": 16}
    chunks = [choose_blocks(**shape, longest=32_768, mean=mean).decode_chunk_pages * 16 for mean in (100, 300, 16_384)]
    assert chunks == [128, 256, 2048]
    assert choose_blocks(**shape, longest=32_768) == choose_blocks(**shape, longest=32_768, mean=16_384)


def test_the_table_of_overrides_goes_before_the_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"generation": "v6e", "heads": 8, "group": 4, "lanes": 128, "page_size": 16, "dtype": "bfloat16"}
    sizes = dataclasses.asdict(SMALL)
    table = tmp_path / "table.json"
    table.write_text(json.dumps([{**key, "blocks": sizes}]))
    found = load_overrides(table)
    assert found == {tuple(key[name] for name in OVERRIDE_KEYS): SMALL}
    monkeypatch.setattr(block_sizes, "load_overrides", lambda: found)
    assert choose_blocks(**key, longest=4096) == SMALL
    assert choose_blocks(**{**key, "page_size": 32}, longest=4096) != SMALL
    for wrong in ({**key, "blocks": {}}, {"blocks": sizes}, {**key, "blocks": {**sizes, "decode_chunk_pages": 7}}):
        other = tmp_path / f"{len(json.dumps(wrong))}.json"
        other.write_text(json.dumps([wrong]))
        with pytest.raises(ConfigError, match="tune anew"):
            load_overrides(other)


def test_the_shipped_table_loads() -> None:
    load_overrides()


@pytest.mark.parametrize(("page_size", "fits"), [(16, False), (128, True)])
def test_a_page_table_that_scalar_memory_cannot_hold_is_refused_with_the_arithmetic(page_size: int, fits: bool) -> None:
    """256 sequences of 32,768 tokens: 2 MiB of page ids at 16 tokens per page, 256 KiB at 128."""
    pages, like = 32_768 // page_size, jax.ShapeDtypeStruct
    metadata = AttentionMetadata(*(like(shape, jnp.int32) for shape in ((256, pages), (257,), (256,), (256,), (256,))))
    kv = like((256, 1, 128), jnp.bfloat16)
    call = functools.partial(
        ragged_paged_attention_tpu, heads=HeadArrays(), options=AttentionOptions(page_size, 1.0), generation="v6e"
    )
    shapes = (like((256, 8, 128), jnp.bfloat16), kv, kv, like((4096, 2, 128), jnp.bfloat16), metadata)
    if fits:
        assert jax.eval_shape(call, *shapes)[0].shape == (256, 8, 128)
    else:
        with pytest.raises(
            BackendUnsupported, match=r"256 sequences of 2048 pages of 16 tokens need 2,1.*of 1,040,384"
        ):
            jax.eval_shape(call, *shapes)
