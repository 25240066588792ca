"""The native write into int8 and int4 buffers gives the bits of the one in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.kv.narrow import LARGEST, SMALLEST, NarrowKV
from engine.kv.scatter import quantise_native, quantise_xla
from engine.native import library

pytestmark = pytest.mark.skipif(not library.available(), reason="no C++ compiler on this machine")

PAGE, SLOTS = 4, 40


def make_buffer(dtype: str, rows: int, head_dim: int) -> NarrowKV:
    rng = np.random.default_rng()
    width, code_dtype = (head_dim, np.int8) if dtype == "int8" else (head_dim // 2, np.uint8)
    codes = rng.integers(0, 128, (SLOTS, rows, width)).astype(code_dtype)
    return NarrowKV(jnp.asarray(codes), jnp.asarray(rng.random((SLOTS // PAGE, rows * PAGE), np.float32)))


def hostile(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Random rows of very different size; some with zeros, infinities, NaN, subnormals or one huge channel."""
    rng = np.random.default_rng()
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 5, (*shape[:-1], 1))
    flat = values.reshape(-1, shape[-1])
    flat[0] = 0
    flat[1, 2] = np.inf
    flat[2, 3] = np.nan
    flat[3] *= 1e-42
    flat[4, 1] = 1e30
    flat[5] = np.ldexp(rng.choice([-1, 1], shape[-1]) * 0.5, 5)  # ties once they are multiplied
    flat[6, 0] = SMALLEST
    flat[7, 0] = 2 * LARGEST
    with np.errstate(over="ignore"):
        return jnp.asarray(values.astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("head_dim", [128, 64, 72, 24])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_bits_are_those_of_plain_jax(dtype: str, head_dim: int) -> None:
    for k_dtype, v_dtype, rows in [("float32", "float32", 6), ("bfloat16", "bfloat16", 8), ("float32", "float16", 6)]:
        buffer = make_buffer(dtype, rows, head_dim)
        loc = jnp.asarray(np.r_[np.random.default_rng().permutation(SLOTS)[:9], -1, 5, 5].astype(np.int32))
        k, v = (hostile((12, 3, head_dim), each) for each in (k_dtype, v_dtype))
        wanted = jax.jit(quantise_xla)(buffer, loc, k, v)
        got = jax.jit(quantise_native)(buffer, loc, k, v)
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_donated_buffer_is_written_in_place() -> None:
    buffer = make_buffer("int4", 6, 128)
    addresses = [array.unsafe_buffer_pointer() for array in buffer]
    k, v = (hostile((12, 3, 128), "bfloat16") for _ in range(2))
    program = jax.jit(quantise_native, donate_argnums=0).lower(buffer, jnp.arange(12), k, v).compile()
    written = program(buffer, jnp.arange(12), k, v)
    assert [array.unsafe_buffer_pointer() for array in written] == addresses
    assert program.memory_analysis().temp_size_in_bytes < 1000
