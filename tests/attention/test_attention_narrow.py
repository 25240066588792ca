"""Attention over int8 and int4 caches, against float64 attention over the values that the codes stand for."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_impls import ALL
from attention_oracle import Case, Geometry, make_case, relative_error, same_bits
from attention_strategies import GEOMETRIES, cases
from hypothesis import given, settings

from engine.attention import ragged_paged_attention
from engine.errors import BackendUnsupported, ShapeError
from engine.kv import NarrowKV, TokenToKVPool

IMPLS = ["reference", "xla", "auto"]
DTYPES = ["int8", "int4"]
# As with a cache of floats (test_attention_values): the values that the codes stand for are exact in float32, so what
# is lost is lost in the sums, and in the output's own rounding.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


def narrow_pool(case: Case, dtype: str, **options) -> TokenToKVPool:
    """The case's cached tokens, quantised by the pool."""
    geometry, slots = case.geometry, case.pool.shape[0]
    heads, dim, page = geometry.kv_heads, geometry.head_dim, geometry.page_size
    pool = TokenToKVPool(slots - page, page, dtype, heads, dim, 1, **options)
    pool.set_kv_buffer(0, np.arange(slots), jnp.array(case.pool[:, 0::2]), jnp.array(case.pool[:, 1::2]))
    return pool


def run(case: Case, buffer: NarrowKV, impl: str, **changes) -> tuple[np.ndarray, NarrowKV]:
    out, written = ragged_paged_attention(case.q, case.k, case.v, buffer, impl=impl, **case.arguments() | changes)
    return np.asarray(out), written


def decoded(buffer: NarrowKV, geometry: Geometry) -> np.ndarray:
    """Float64 ``[S, 2H, D]`` by the contract: nibbles, scales by page, keys of int4 rotated back."""
    codes, scales = (np.asarray(part) for part in buffer)
    slots = np.arange(len(codes))[:, None]
    rows, page = np.arange(2 * geometry.kv_heads)[None, :], geometry.page_size
    if codes.dtype == np.uint8:
        nibbles = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.int64)
        codes = nibbles - 16 * (nibbles > 7)
    values = codes.astype(np.float64) * scales[slots // page, rows * page + slots % page][..., None]
    if buffer.codes.dtype == np.uint8:
        block = geometry.head_dim & -geometry.head_dim
        matrix = np.ones((1, 1))
        while len(matrix) < block:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
        values[:, 0::2] = values[:, 0::2] @ np.kron(np.eye(geometry.head_dim // block), matrix)
    return values


def over_decoded(case: Case, buffer: NarrowKV) -> Case:
    """The case whose contexts are what the written buffer stands for."""
    values, contexts = decoded(buffer, case.geometry), []
    for row, kv_len in enumerate(case.kv_lens):
        slots = np.array([case.slot(row, position) for position in range(kv_len)], int)
        contexts.append((values[slots, 0::2], values[slots, 1::2]))
    return replace(case, contexts=contexts)


@pytest.mark.parametrize(
    "name", ["gqa", "mha_d80_page1", "d128_tiles", "window", "sinks", "soft_cap", "everything_bf16"]
)
@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_float64_oracle_over_what_the_codes_stand_for(name, impl, dtype):
    @given(cases(GEOMETRIES[name]))
    @settings(max_examples=2)
    def check(case):
        out, written = run(case, narrow_pool(case, dtype).buffers[0], impl)
        want = over_decoded(case, written).expected_out()
        # Over int4 codes the native kernel's queries and weights have 15 bits below their largest.
        tolerance = max(TOLERANCE[case.geometry.dtype], 2e-4 if (impl, dtype) == ("cpu", "int4") else 0)
        assert relative_error(out, want) <= tolerance or not any(case.q_lens)
        assert not out[case.cu_q_lens[-1] :].any()

    check()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dead_slots_of_nan_scales_reach_no_output(impl, dtype):
    case = make_case(GEOMETRIES["window"], [9, 1, 0, 20], [30, 61, 4, 0], seed=3)
    codes, scales = (np.array(part) for part in narrow_pool(case, dtype).buffers[0])
    dead = np.flatnonzero(~case.owned_slots(new=False))
    page = case.geometry.page_size
    rows = np.arange(2 * case.geometry.kv_heads)[None, :]
    plain, _ = run(case, NarrowKV(jnp.array(codes), jnp.array(scales)), impl)
    codes[dead] = np.random.default_rng().integers(0, 128, codes[dead].shape)
    scales[dead[:, None] // page, rows * page + dead[:, None] % page] = np.nan
    poisoned, _ = run(case, NarrowKV(jnp.array(codes), jnp.array(scales)), impl)
    assert same_bits(poisoned, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hostile_tokens_stay_in_their_own_sequence(dtype):
    case = make_case(Geometry(), [9, 1, 0, 20], [30, 61, 4, 0], seed=4)
    k, v = case.k.copy(), case.v.copy()
    k[2], v[2] = np.nan, np.inf
    pool = narrow_pool(case, dtype)
    plain, _ = run(case, pool.buffers[0], "xla")
    hurt, _ = run(replace(case, k=k, v=v), pool.buffers[0], "xla")
    assert np.isnan(hurt[2:9]).any()
    assert same_bits(hurt[9:], plain[9:])
    k[2], v[2, :, 1:] = 0, 0  # an infinite channel alone saturates, and zeros are zeros
    k[3, :, 5], k[4] = 1e30, 1e-42
    finite, _ = run(replace(case, k=k, v=v), pool.buffers[0], "xla")
    assert np.isfinite(finite).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_write_the_bytes_of_a_whole_prompt(dtype):
    case = make_case(Geometry(rows=1), [48], [0], seed=5)
    empty = TokenToKVPool(case.pool.shape[0] - 16, 16, dtype, 2, 64, 1).buffers[0]
    out, whole = run(case, empty, "xla")
    chunked, parts, begin = empty, [], 0
    for end in (13, 14, 15, 48):
        tokens = (np.asarray(array[begin:end]) for array in (case.q, case.k, case.v))
        lens = {"cu_q_lens": np.array([0, end - begin], np.int32), "kv_lens": np.array([end], np.int32)}
        arguments = case.arguments() | lens
        part, chunked = ragged_paged_attention(*tokens, chunked, impl="xla", **arguments)
        parts.append(np.asarray(part))
        begin = end
    assert all(same_bits(one, other) for one, other in zip(whole, chunked, strict=True))
    assert relative_error(np.concatenate(parts), out) <= TOLERANCE["float32"]


@pytest.mark.parametrize(("dtype", "head_dim"), [("int8", 64), ("int8", 80), ("int4", 128)])
@pytest.mark.parametrize("impl", IMPLS)
def test_storage_for_a_tpu_is_taken_as_it_is(dtype, head_dim, impl):
    case = make_case(Geometry(head_dim=head_dim), [5, 1, 0, 20], [10, 33, 4, 0], seed=1)
    plain, _ = run(case, narrow_pool(case, dtype).buffers[0], impl)
    for_tpu = narrow_pool(case, dtype, platform="tpu").buffers[0]
    assert for_tpu.codes.shape[-1] == 128
    assert same_bits(run(case, for_tpu, impl)[0], plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_temporary_of_the_caches_size(dtype):
    case = make_case(Geometry(), [5, 1, 0, 20], [10, 33, 4, 0], seed=2)
    buffer = TokenToKVPool(16 * 16384, 16, dtype, 2, 64, 1).buffers[0]

    def call(buffer, q, k, v):
        return ragged_paged_attention(q, k, v, buffer, impl="xla", **case.arguments())

    program = jax.jit(call, donate_argnums=0).lower(buffer, case.q, case.k, case.v).compile()
    usage = program.memory_analysis()
    assert usage.alias_size_in_bytes == buffer.codes.nbytes + buffer.scales.nbytes
    assert usage.temp_size_in_bytes < buffer.scales.nbytes


def test_what_cannot_be_read_is_refused():
    case = make_case(Geometry(), [5, 1, 0, 20], [10, 33, 4, 0], seed=2)
    buffer = narrow_pool(case, "int8").buffers[0]
    with pytest.raises(ShapeError, match="pages of 16 tokens, and page_size=8"):
        run(case, buffer, "xla", page_size=8)
    with pytest.raises(ShapeError, match="not one float32 for each"):
        run(case, NarrowKV(buffer.codes, buffer.scales[:, :-1]), "xla")
    for impl in ("tpu", "gpu"):
        with pytest.raises(BackendUnsupported, match=impl):
            run(case, buffer, impl)
