"""set_kv_buffer: what is written where, what is not, and that nothing but the rows is touched."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scatter_oracle import assert_same_bits, expected, random_case

from engine.errors import ShapeError
from engine.kv.layout import KVLayout, merge_kv, pad_fused
from engine.kv.scatter import set_kv_buffer
from engine.native import library

SLOTS = 24
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn"]


needs_native = pytest.mark.skipif(not library.available(), reason="no C++ compiler on this machine")


@pytest.fixture(scope="module", params=[pytest.param("native", marks=needs_native), "xla"], autouse=True)
def path(request):
    """Each of the two programs, as the public function chooses them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "available", lambda: request.param == "native")
        jax.clear_caches()  # the choice is made while tracing
        yield request.param
    jax.clear_caches()


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_the_rows_and_nothing_else(dtype):
    fused, k, v = random_case(SLOTS, 3, 16, 4, dtype)
    loc = jnp.array([7, -1, 23, 0])
    assert_same_bits(set_kv_buffer(fused, loc, k, v), expected(fused, loc, k, v))


@pytest.mark.parametrize(("dtype", "most"), [("float8_e4m3fn", 448.0), ("float8_e5m2", 57344.0)])
@pytest.mark.parametrize("given", ["float32", "bfloat16"])
def test_what_an_8_bit_float_cannot_reach_becomes_its_largest_value_and_not_nan(dtype, most, given):
    k = jnp.asarray(np.array([[[1e6, -1e6, most, -0.5, np.nan, np.inf]]]), given)
    written = set_kv_buffer(jnp.zeros((2, 2, 6), dtype), jnp.array([1]), k, -k)
    row = np.array([most, -most, most, -0.5, np.nan, most])
    np.testing.assert_array_equal(np.asarray(written[1], np.float32), np.stack([row, -row]))


@pytest.mark.parametrize(
    ("given", "stored"), [("bfloat16", "float16"), ("float32", "float16"), ("float32", "bfloat16")]
)
def test_every_finite_value_stays_finite_and_an_infinity_is_seen(given, stored):
    most = float(jnp.finfo(stored).max)
    rng = np.random.default_rng()
    finite = np.concatenate([[65504.0, 65519.0, 65520.0, 65536.0, 1e5], rng.uniform(1e4, 1e6, 8), [3.38e38]])
    if given == "float32":
        finite = np.append(finite, np.finfo(np.float32).max)
    values = jnp.asarray(np.concatenate([finite, -finite, [np.inf, -np.inf, np.nan]]), given)
    k = values[None, None]
    written = set_kv_buffer(jnp.zeros((2, 2, values.size), stored), jnp.array([1]), k, -k)
    with np.errstate(over="ignore"):
        cast = np.asarray(values, np.float32).astype(stored).astype(np.float32)
    count = 2 * finite.size
    cast[:count] = np.clip(cast[:count], -most, most)
    np.testing.assert_array_equal(np.asarray(written[1], np.float32), np.stack([cast, -cast]))


def test_negative_and_out_of_range_slots_are_dropped():
    fused, k, v = random_case(SLOTS, 2, 8, 6, "bfloat16")
    loc = jnp.array([-1, -SLOTS, SLOTS, np.iinfo(np.int32).min, np.iinfo(np.int32).max, -2])
    assert_same_bits(set_kv_buffer(fused, loc, k, v), fused)


def test_the_last_of_equal_slots_wins():
    fused, k, v = random_case(SLOTS, 2, 8, 64, "float32")
    loc = jnp.asarray(np.random.default_rng().integers(-3, 5, 64))
    assert_same_bits(set_kv_buffer(fused, loc, k, v), expected(fused, loc, k, v))


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"), [(1, 64, "float8_e4m3fn"), (3, 80, "bfloat16"), (5, 128, "bfloat16")]
)
def test_padded_storage_takes_real_sizes_and_zeros_its_padding(heads, head_dim, dtype):
    stored = KVLayout.create(head_num=heads, head_dim=head_dim, dtype=dtype, page_size=8, platform="tpu")
    fused, k, v = random_case(SLOTS, heads, head_dim, 3, dtype, stored.rows, stored.lanes)
    written = set_kv_buffer(fused, jnp.array([2, 2, 9]), k, v)
    assert_same_bits(written, expected(fused, [2, 2, 9], k, v))
    assert_same_bits(written[9], pad_fused(merge_kv(k, v), stored.rows, stored.lanes)[2])


def test_k_and_v_are_cast_to_the_buffer():
    fused, k, v = random_case(SLOTS, 2, 8, 3, "float32")
    stored = fused.astype(jnp.bfloat16)
    loc = jnp.array([5, 1, 8])
    wanted = expected(stored, loc, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16))
    assert_same_bits(set_kv_buffer(stored, loc, k, v), wanted)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint32"])
def test_slots_of_any_integer_type(dtype):
    slots = 300  # more than int8 and uint8 can say
    fused, k, v = random_case(slots, 1, 8, 3, "float32")
    loc = np.array([100, 7, 3]).astype(dtype)
    assert_same_bits(set_kv_buffer(fused, loc, k, v), expected(fused, loc, k, v))


def test_no_tokens_write_nothing():
    fused, k, v = random_case(SLOTS, 2, 8, 0, "bfloat16")
    assert_same_bits(set_kv_buffer(fused, jnp.zeros(0, jnp.int32), k, v), fused)


def test_the_argument_of_an_undonated_call_stays():
    fused, k, v = random_case(SLOTS, 2, 8, 2, "bfloat16")
    before = np.array(fused)
    set_kv_buffer(fused, jnp.array([1, 2]), k, v)
    assert_same_bits(fused, before)


def make_arguments(**changes):
    sizes = {"fused": (SLOTS, 4, 8), "loc": (3,), "k": (3, 2, 8), "v": (3, 2, 8)}
    dtypes = {"fused": "bfloat16", "loc": "int32", "k": "bfloat16", "v": "bfloat16"}
    for name, (shape, dtype) in changes.items():
        sizes[name], dtypes[name] = shape, dtype
    return [jnp.ones(sizes[name], dtypes[name]) for name in ("fused", "loc", "k", "v")]


@pytest.mark.parametrize(
    "change",
    [
        {"k": ((3, 2, 9), "bfloat16")},
        {"k": ((3, 2, 8), "float32")},
        {"v": ((2, 2, 8), "bfloat16")},
        {"loc": ((4,), "int32")},
        {"loc": ((3, 1), "int32")},
        {"loc": ((3,), "float32")},
        {"fused": ((SLOTS, 6, 8), "bfloat16")},
        {"fused": ((SLOTS, 4, 16), "bfloat16")},
        {"fused": ((SLOTS, 4), "bfloat16")},
        {"fused": ((SLOTS, 4, 8), "int8")},
        {"k": ((3, 8), "bfloat16"), "v": ((3, 8), "bfloat16")},
    ],
)
def test_arrays_that_do_not_fit_are_refused(change):
    with pytest.raises(ShapeError):
        set_kv_buffer(*make_arguments(**change))


@pytest.mark.parametrize("slot", [2**32 + 5, -(2**32) + 5, 2**63 - 1])
def test_a_slot_beyond_32_bits_is_dropped_and_does_not_wrap_into_range(slot: int) -> None:
    fused, k = jnp.ones((8, 2, 4)), jnp.full((1, 1, 4), 7.0)
    np.testing.assert_array_equal(set_kv_buffer(fused, np.array([slot]), k, k), fused)


def test_a_dtype_packed_below_a_byte_is_refused() -> None:
    fused, k = jnp.zeros((8, 2, 4), jnp.int4), jnp.zeros((1, 1, 4), jnp.int4)
    with pytest.raises(ShapeError, match="int4 is packed below a byte"):
        set_kv_buffer(fused, jnp.zeros(1, jnp.int32), k, k)


@pytest.mark.parametrize(("dtype", "most"), [("float16", 65504.0), ("bfloat16", float(jnp.finfo("bfloat16").max))])
def test_what_is_finite_stays_finite_in_a_narrower_float_and_what_is_not_is_seen(dtype, most):
    largest = float(jnp.finfo("float32").max)
    values = [largest, -largest, most, most * 1.0005, 65519.0, -0.5, np.nan, np.inf, -np.inf]
    k = jnp.asarray(np.array([[values]]), "float32")
    written = np.asarray(set_kv_buffer(jnp.ones((2, 2, len(values)), dtype), jnp.array([1]), k, -k)[1], np.float32)
    row = np.array([most, -most, most, most, min(65519.0, most), -0.5, np.nan, np.inf, -np.inf], np.float32)
    row = np.asarray(jnp.asarray(row, dtype), np.float32)
    np.testing.assert_array_equal(written, np.stack([row, -row]))
