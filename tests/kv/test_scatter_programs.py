"""The two programs behind set_kv_buffer: equal results, in place, each on its platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scatter_oracle import assert_same_bits, expected, random_case

from engine.kv.scatter import scatter_native, scatter_xla, set_kv_buffer
from engine.native import library

SLOTS = 24
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn"]
NATIVE = library.available()
needs_native = pytest.mark.skipif(not NATIVE, reason="no C++ compiler on this machine")


@settings(max_examples=30)
@given(st.lists(st.integers(-3, SLOTS + 3), min_size=12, max_size=12))
def test_both_programs_equal_a_plain_loop(slots):
    fused, k, v = random_case(SLOTS, 2, 8, 12, "bfloat16")
    loc = jnp.asarray(slots, jnp.int32)
    wanted = expected(fused, loc, k, v)
    cleaned = jnp.where((loc < 0) | (loc >= SLOTS), -1, loc)
    assert_same_bits(jax.jit(scatter_xla)(fused, cleaned, k, v), wanted)
    if NATIVE:
        assert_same_bits(jax.jit(scatter_native)(fused, cleaned, k, v), wanted)
        assert_same_bits(jax.jit(scatter_native)(fused, loc, k, v), wanted)  # the kernel guards memory itself


@needs_native
def test_the_native_kernel_moves_bytes_not_numbers():
    """A detour through another float type would quieten these signalling NaN."""
    payloads = np.arange(0x7F81, 0x7F81 + 2 * 2 * 8, dtype=np.uint16).reshape(2, 2, 8)
    k = jax.lax.bitcast_convert_type(jnp.asarray(payloads), jnp.bfloat16)
    fused = jnp.ones((SLOTS, 4, 8), jnp.bfloat16)
    written = jax.jit(scatter_native)(fused, jnp.array([3, 4]), k, k)
    assert_same_bits(jax.lax.bitcast_convert_type(written[3:5, ::2], jnp.uint16), payloads)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_donated_buffer_is_written_in_place(dtype):
    """Same address, aliased whole, and no temporary or copy of its size: in a jit of the user's, among other work."""
    fused, k, v = random_case(4096, 8, 64, 32, dtype)
    loc = jnp.asarray(np.random.default_rng().permutation(4096)[:32])

    def step(buffers, loc, k, v):
        def layer(_, carry):
            buffers, x = carry
            buffers = [set_kv_buffer(buffer, loc, k * x, v) for buffer in buffers]
            return buffers, x + buffers[0][0, 0, 0].astype(x.dtype) * 0

        return jax.lax.fori_loop(0, 3, layer, (buffers, jnp.ones((), k.dtype)))[0]

    buffers = [fused, fused + jnp.ones((), dtype)]
    wanted = [expected(buffer, loc, k, v) for buffer in buffers]
    program = jax.jit(step, donate_argnums=0).lower(buffers, loc, k, v).compile()
    usage = program.memory_analysis()
    assert usage.alias_size_in_bytes == 2 * fused.nbytes
    assert usage.temp_size_in_bytes < fused.nbytes / 8
    addresses = [buffer.unsafe_buffer_pointer() for buffer in buffers]
    written = program(buffers, loc, k, v)
    assert [buffer.unsafe_buffer_pointer() for buffer in written] == addresses
    for got, want in zip(written, wanted, strict=True):
        assert_same_bits(got, want)


def test_a_lowering_for_another_platform_has_no_native_call():
    fused, k, v = random_case(SLOTS, 2, 128, 3, "bfloat16")
    traced = jax.jit(set_kv_buffer).trace(fused, jnp.arange(3), k, v)
    assert library.SCATTER not in traced.lower(lowering_platforms=("tpu",)).as_text()
    if NATIVE:
        assert library.SCATTER in traced.lower().as_text()
