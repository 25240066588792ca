"""The log-sum-exp and the scales of a quantised cache, in every backend, against the float64 oracle."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_impls import ALL, NATIVE
from attention_oracle import Case, Geometry, make_case, relative_error, same_bits
from attention_strategies import cases
from hypothesis import given, settings

from engine.attention import AttentionMetadata, FlashAttentionBackend, ragged_paged_attention
from engine.attention.metadata import locate_new_tokens
from engine.errors import BackendUnsupported, ShapeError

GEOMETRIES = {
    "float32": Geometry(),
    "window, cap and sinks": Geometry(window=7, soft_cap=2.5, sinks=True, page_size=4, columns=20),
    "scales": Geometry(scales=True, sinks=True),
    "bfloat16, scales": Geometry(dtype="bfloat16", head_dim=128, columns=20, scales=True),
    "head_dim 80, scales": Geometry(q_heads=3, kv_heads=3, head_dim=80, page_size=1, columns=70, scales=True),
}
FLOAT8 = {
    name: Geometry(dtype="bfloat16", cache_dtype=name, scales=True, page_size=32, columns=5)
    for name in ("float8_e4m3fn", "float8_e5m2")
}
# float32: sums of a few hundred products of unit normals. bfloat16: the output is rounded to 8 bits, and where q is not
# brought to float32 first, a logit of up to about 6 moves by 2 ** -9 of that.
OUT_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
LSE_TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-5}


def run(case: Case, impl: str) -> tuple[np.ndarray, ...]:
    results = ragged_paged_attention(
        case.q, case.k, case.v, jnp.array(case.pool), impl=impl, return_lse=True, **case.arguments()
    )
    return tuple(np.asarray(result) for result in results)


def assert_right(case: Case, impl: str) -> None:
    out, pool, lse = run(case, impl)
    expected, expected_lse = case.expected()
    dtype = case.geometry.dtype
    assert out.dtype == case.q.dtype
    assert lse.dtype == np.float32
    if any(case.q_lens):
        assert relative_error(out, expected) <= OUT_TOLERANCE[dtype]
    assert same_bits(pool, case.expected_pool())
    assert same_bits(np.isneginf(lse), np.isneginf(expected_lse))
    live = int(case.cu_q_lens[-1])
    np.testing.assert_allclose(lse[:live], expected_lse[:live], atol=LSE_TOLERANCE[dtype], rtol=LSE_TOLERANCE[dtype])


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("impl", ALL)
def test_lse_and_scaled_caches_equal_the_oracle(name: str, impl: str) -> None:
    @given(cases(GEOMETRIES[name]))
    @settings(max_examples=5)
    def check(case: Case) -> None:
        assert_right(case, impl)

    check()


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize("impl", ALL)
def test_a_scale_may_stand_alone_in_half_precision(name: str, impl: str) -> None:
    case = make_case(GEOMETRIES["bfloat16, scales"], [10, 1, 0, 20], [11, 30, 4, 0], seed=6)
    out, pool, _ = run(dataclasses.replace(case, **{name: None}), impl)
    same_out, same_pool, _ = run(dataclasses.replace(case, **{name: np.ones(case.k.shape[1], np.float32)}), impl)
    assert same_bits(pool, same_pool)
    assert relative_error(out, same_out.astype(np.float64)) <= OUT_TOLERANCE["bfloat16"]


@pytest.mark.parametrize("name", FLOAT8)
@pytest.mark.parametrize("impl", ["reference", "xla", "auto"])
def test_float8_caches_with_scales_equal_the_oracle(name: str, impl: str) -> None:
    @given(cases(FLOAT8[name]))
    @settings(max_examples=4)
    def check(case: Case) -> None:
        assert_right(case, impl)

    check()


@pytest.mark.parametrize("impl", [NATIVE])
def test_the_native_kernel_leaves_other_float8_caches_to_others(impl: str) -> None:
    with pytest.raises(BackendUnsupported, match="float8_e5m2"):
        run(make_case(FLOAT8["float8_e5m2"], [1, 0, 0, 0], [9, 0, 0, 0], seed=1), impl)


@pytest.mark.parametrize("impl", ALL)
def test_asking_for_the_lse_changes_no_bit_of_the_rest(impl: str) -> None:
    case = make_case(Geometry(sinks=True), [10, 1, 0, 20], [11, 30, 4, 0], seed=2)
    plain = ragged_paged_attention(case.q, case.k, case.v, jnp.array(case.pool), impl=impl, **case.arguments())
    assert len(plain) == 2
    for got, same in zip(run(case, impl), plain, strict=False):
        assert same_bits(got, same)


@pytest.mark.parametrize("impl", ALL)
def test_two_halves_of_a_context_merge_by_their_lse_into_the_whole(impl: str) -> None:
    """What splits a context over devices needs: out = sum of out_i * exp(lse_i - lse)."""
    geometry = Geometry(rows=1, tokens=1, columns=10)
    case = make_case(geometry, [1], [geometry.row_tokens - 1], seed=3)
    half = dataclasses.replace(geometry, columns=5)
    parts = []
    for pages, writes in ((slice(0, 5), False), (slice(5, 10), True)):
        backend = backend_of(half, impl)
        metadata = AttentionMetadata(
            page_table=case.page_table[:, pages],
            cu_q_lens=case.cu_q_lens,
            kv_lens=np.array([half.row_tokens], np.int32),
            out_cache_loc=np.array([case.slot(0, geometry.row_tokens - 1) if writes else -1], np.int32),
            positions=np.array([half.row_tokens - 1], np.int32),
        )
        parts.append(backend(case.q, case.k, case.v, jnp.array(case.pool), metadata, return_lse=True))
    assert same_bits(parts[0][1], case.pool)  # a token with no slot is not written
    lse = np.logaddexp(parts[0][2], parts[1][2])
    merged = sum(np.asarray(part[0]) * np.exp(part[2] - lse)[..., None] for part in parts)
    expected, expected_lse = case.expected()
    assert relative_error(merged, expected) <= 1e-5
    np.testing.assert_allclose(lse, expected_lse, atol=2e-5)


def backend_of(geometry: Geometry, impl: str) -> FlashAttentionBackend:
    heads = {"num_q_heads": geometry.q_heads, "num_kv_heads": geometry.kv_heads, "head_dim": geometry.head_dim}
    return FlashAttentionBackend(page_size=geometry.page_size, impl=impl, **heads)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_that_sees_no_key_is_zero_and_has_no_weight(impl: str, sinks: bool) -> None:
    """Of a context that is split over devices, one may hold nothing; lengths are not checked where they are traced."""
    case = make_case(Geometry(sinks=sinks), [1, 1, 3, 0], [20, 0, 0, 4], seed=4).poisoned()
    kv_lens = np.array([21, 0, 0, 4], np.int32)
    positions, slots = locate_new_tokens(
        case.page_table, case.cu_q_lens, kv_lens, num_tokens=case.q.shape[0], page_size=16, xp=np
    )
    backend = backend_of(case.geometry, impl)

    @jax.jit
    def step(pool: Any, metadata: AttentionMetadata, sinks: Any) -> Any:
        return backend(case.q, case.k, case.v, pool, metadata, sinks=sinks, return_lse=True)

    metadata = AttentionMetadata(case.page_table, case.cu_q_lens, kv_lens, slots, positions)
    out, pool, lse = (np.asarray(result) for result in step(case.pool, metadata, case.sinks))
    expected, expected_lse = case.expected()
    assert relative_error(out[0], expected[0]) <= 1e-5
    np.testing.assert_allclose(lse[0], expected_lse[0], atol=2e-5)
    assert not out[1:].any()
    np.testing.assert_allclose(lse[1:5], np.tile(case.sinks if sinks else [-np.inf] * 8, (4, 1)), atol=1e-6)
    assert np.isneginf(lse[5:]).all()
    changed = (pool.view(np.uint32) != case.pool.view(np.uint32)).any((1, 2))
    assert np.flatnonzero(changed).tolist() == [case.slot(0, 20)]


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize(
    ("scale", "match"),
    [
        (np.ones(3, np.float32), r"float32\(2,\)"),
        (np.ones(2, np.float64), "float64"),
        (np.array([1, 0], np.float32), r"\[1\] is 0.0"),
        (np.array([-1, 1], np.float32), r"\[0\] is -1.0"),
        (np.array([1, np.nan], np.float32), r"\[1\] is nan"),
    ],
)
def test_a_wrong_scale_is_refused(name: str, scale: np.ndarray, match: str) -> None:
    case = make_case(Geometry(), [10, 1, 0, 20], [11, 30, 4, 0], seed=5)
    with pytest.raises(ShapeError, match=name + ".*" + match):
        ragged_paged_attention(case.q, case.k, case.v, jnp.array(case.pool), **{**case.arguments(), name: scale})


@pytest.mark.parametrize("impl", ALL)
def test_scales_are_runtime_arrays_so_that_one_program_serves_every_layer(impl: str) -> None:
    traces = 0

    @jax.jit
    def step(q: Any, k: Any, v: Any, pool: Any, table: Any, bounds: Any, lens: Any, *scales: Any) -> Any:
        nonlocal traces
        traces += 1
        described = {"page_table": table, "cu_q_lens": bounds, "kv_lens": lens, "page_size": 16}
        return ragged_paged_attention(q, k, v, pool, impl=impl, k_scale=scales[0], v_scale=scales[1], **described)

    for seed in range(3):
        case = make_case(Geometry(scales=True), [10, 1, 0, 20], [11, 30, 4, 0], seed)
        lengths = case.page_table, case.cu_q_lens, case.kv_lens
        out, _ = step(case.q, case.k, case.v, case.pool, *lengths, case.k_scale, case.v_scale)
        assert relative_error(out, case.expected_out()) <= 1e-5
    assert traces == 1
