import jax.numpy as jnp
import numpy as np
import pytest
from attention_impls import ALL, FAST
from attention_oracle import DTYPES, Case, Geometry, make_case, relative_error, same_bits
from attention_strategies import GEOMETRIES, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention import ragged_paged_attention

# float32 keeps 24 bits; sums of a few hundred products of unit normals lose at most a few more. bfloat16 keeps 8 bits
# (a half unit in the last place is 2 ** -9 = 0.002) and float16 11, which the output's own rounding spends.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


def run(case: Case, impl: str) -> tuple[np.ndarray, np.ndarray]:
    out, pool = ragged_paged_attention(case.q, case.k, case.v, jnp.array(case.pool), impl=impl, **case.arguments())
    return np.asarray(out), np.asarray(pool)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("impl", ALL)
def test_equals_the_float64_oracle_and_writes_exactly_the_new_tokens(name: str, impl: str) -> None:
    @given(cases(GEOMETRIES[name]))
    @settings(max_examples=6)
    def check(case: Case) -> None:
        out, pool = run(case, impl)
        assert out.dtype == DTYPES[case.geometry.dtype]
        assert relative_error(out, case.expected_out()) <= TOLERANCE[case.geometry.dtype] or not any(case.q_lens)
        assert not out[case.cu_q_lens[-1] :].any()
        assert same_bits(pool, case.expected_pool())

    check()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("name", ["gqa", "d128_tiles", "everything_bf16", "bf16"])
def test_a_fast_backend_equals_the_reference(name: str, impl: str) -> None:
    @given(cases(GEOMETRIES[name]))
    @settings(max_examples=6)
    def check(case: Case) -> None:
        expected, expected_pool = run(case, "reference")
        out, pool = run(case, impl)
        assert relative_error(out, expected) <= TOLERANCE[case.geometry.dtype]
        assert same_bits(pool, expected_pool)

    check()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("storage", [(2, 128), (8, 128)])
def test_padded_storage_is_taken_as_it_is(storage: tuple[int, int], impl: str) -> None:
    geometry = Geometry(q_heads=6, kv_heads=1 if storage[0] == 2 else 3, head_dim=80)
    case = make_case(geometry, [5, 1, 0, 20], [10, 33, 4, 0], seed=1)
    rows, lanes = storage
    padded = np.full((case.pool.shape[0], rows, lanes), np.nan, np.float32)
    padded[:, : 2 * geometry.kv_heads, : geometry.head_dim] = case.pool
    plain, _ = run(case, impl)
    out, pool = ragged_paged_attention(case.q, case.k, case.v, jnp.array(padded), impl=impl, **case.arguments())
    assert same_bits(out, plain)
    assert same_bits(np.asarray(pool)[:, : 2 * geometry.kv_heads, : geometry.head_dim], case.expected_pool())


def test_float8_storage_is_read_as_the_values_it_holds() -> None:
    case = make_case(Geometry(), [5, 1, 0, 20], [10, 33, 4, 0], seed=2)
    stored = jnp.array(case.pool).astype(jnp.float8_e4m3fn)
    results = [
        ragged_paged_attention(case.q, case.k, case.v, stored, impl=impl, **case.arguments())
        for impl in ("reference", "xla")
    ]
    assert results[1][1].dtype == jnp.float8_e4m3fn
    assert relative_error(results[1][0], results[0][0]) <= 1e-5
    # Rounding K and V to 3 bits of mantissa is visible, and no more than visible.
    assert 1e-4 < relative_error(results[1][0], case.expected_out()) < 0.2


@pytest.mark.parametrize("impl", FAST)
def test_long_context_in_bf16_stays_as_exact_as_a_short_one(impl: str) -> None:
    @given(st.integers(0, 2**32 - 1))
    @settings(max_examples=3)
    def check(seed: int) -> None:
        geometry = Geometry(dtype="bfloat16", q_heads=2, kv_heads=1, page_size=64, columns=64, tokens=2, rows=2)
        case = make_case(geometry, [1, 1], [4095, 3000], seed)
        # The output's own rounding is 2 ** -9 of its largest element; state in bfloat16 would lose ten times that.
        assert relative_error(run(case, impl)[0], case.expected_out()) <= 4e-3

    check()


@pytest.mark.slow
@pytest.mark.parametrize("impl", FAST)
def test_positions_past_32767_do_not_wrap(impl: str) -> None:
    geometry = Geometry(dtype="bfloat16", q_heads=2, kv_heads=1, page_size=256, columns=160, tokens=8, rows=2)
    case = make_case(geometry, [1, 7], [40_000, 32_764], seed=3)
    assert relative_error(run(case, impl)[0], case.expected_out()) <= 1e-2
