"""int8 and int4 buffers against plain NumPy: quantisation, hostile values, writes in place, page copies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.errors import ConfigError, ShapeError
from engine.kv.layout import KVLayout
from engine.kv.narrow import LARGEST, SMALLEST, NarrowKV, dequantise, kind_of, quantise, rotate
from engine.kv.page_copy import copy_pages, read_pages, write_pages
from engine.kv.pool import TokenToKVPool
from engine.kv.scatter import set_kv_buffer
from engine.native import library

TOP = {"int8": 127, "int4": 8}
CODES = {"int8": np.int8, "int4": np.uint8}
PAGE = 8


def kind(dtype):
    return kind_of(CODES[dtype])


def make_pool(dtype, **changes):
    settings = {"size": 6 * PAGE, "page_size": PAGE, "head_num": 2, "head_dim": 16, "layer_num": 2}
    return TokenToKVPool(dtype=dtype, **(settings | changes))


def hadamard(dim):
    """Sylvester's matrix over the largest power of two in ``dim``, in blocks."""
    block = dim & -dim
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(dim // block), matrix / np.sqrt(block))


def random_tokens(pool, count, dtype="float32"):
    rng = np.random.default_rng()
    loc = rng.choice(np.arange(PAGE, pool.size + PAGE), count, replace=False).astype(np.int32)
    size = rng.lognormal(0, 2, (2, count, pool.layout.head_num, 1))
    k, v = size * rng.standard_normal((2, count, pool.layout.head_num, pool.layout.head_dim))
    return jnp.asarray(loc), jnp.asarray(k, dtype), jnp.asarray(v, dtype)


def within(got, wanted, dtype):
    """Whether each row is within half a step of what was stored, a step being its largest over the largest code.

    Four bits hold -8 and no 8: there what is as large as the largest, with the other sign, is a step away.
    """
    step = np.abs(wanted).max(-1, keepdims=True) / TOP[dtype]
    extreme = np.take_along_axis(wanted, np.abs(wanted).argmax(-1)[..., None], -1)
    clipped = (dtype == "int4") & (wanted * np.sign(extreme) < -7.5 * step)
    return (np.abs(got - wanted) <= np.where(clipped, 1, 0.5) * step * (1 + 1e-4)).all()


@pytest.mark.parametrize("dtype", TOP)
def test_codes_are_the_nearest_and_need_no_other_row(dtype):
    rows = np.random.default_rng().standard_normal((50, 24)).astype(np.float32)
    codes, scales = quantise(jnp.asarray(rows), kind(dtype))
    assert codes.dtype == CODES[dtype]
    assert codes.shape[-1] == (24 if dtype == "int8" else 12)
    np.testing.assert_allclose(np.abs(scales), np.abs(rows).max(-1) / TOP[dtype], rtol=1e-6)
    assert within(np.asarray(dequantise(codes, scales)), rows, dtype)
    for row in (0, 17):
        alone = quantise(jnp.asarray(rows[row]), kind(dtype))
        np.testing.assert_array_equal(alone[0], codes[row])
        assert alone[1] == scales[row]


def test_two_codes_of_a_row_share_a_byte():
    codes, scales = quantise(jnp.asarray([[7.0, -8, 3, 0, 1, -1], [8.0, -8, 3, 0, 0.5, 8]]), kind("int4"))
    # Elements 0 and 3, 1 and 4, 2 and 5. Of 8 and -8 the negative one is held to be the largest.
    assert np.asarray(codes).tolist() == [[0x07, 0x18, 0xF3], [0x07, 0x08, 0x73]]
    assert np.asarray(scales).tolist() == [1, 1]
    negative, scale = quantise(jnp.asarray([[8.0, 4, -7, 0]]), kind("int4"))
    assert (np.asarray(negative).tolist(), np.asarray(scale).tolist()) == ([[0x78, 0x0C]], [-1])


@pytest.mark.parametrize("dtype", TOP)
def test_hostile_rows(dtype):
    top, rows = TOP[dtype], np.zeros((8, 8), np.float32)
    rows[1, 2], rows[2, 3] = np.inf, -np.inf
    rows[3, 0], rows[3, 1] = 1e30, 1.0  # one huge channel
    rows[4] = 1e-42  # subnormal
    rows[5, 4], rows[5, 5] = np.nan, 1.0
    rows[6, 1] = SMALLEST
    rows[7] = np.finfo(np.float32).max
    codes, scales = quantise(jnp.asarray(rows), kind(dtype))
    values = np.asarray(dequantise(codes, scales))
    assert not values[0].any()
    assert scales[0] == 0
    assert values[1, 2] == -values[2, 3] == np.float32(top * np.float32(LARGEST * np.float32(1 / top)))
    assert np.isfinite(values[[1, 2, 3, 7]]).all()
    assert values[3, 0] == pytest.approx(1e30, rel=1e-6)
    assert values[3, 1] == 0
    assert not values[4].any()
    assert scales[4] == 0
    assert np.isnan(values[5]).all()  # it shows in its own sequence, as in a cache of floats
    assert not np.asarray(codes)[5].any()
    assert values[6, 1] == pytest.approx(SMALLEST, rel=1e-6)


@pytest.mark.parametrize("dim", [2, 16, 64, 80, 96, 128, 7])
def test_the_rotation_is_hadamards_and_its_own_inverse(dim):
    x = np.random.default_rng().standard_normal((3, 2, dim)).astype(np.float32)
    rotated = np.asarray(rotate(jnp.asarray(x)))
    np.testing.assert_allclose(rotated, x @ hadamard(dim), atol=1e-5)
    np.testing.assert_allclose(rotate(jnp.asarray(rotated)), x, atol=1e-5)


@pytest.mark.parametrize("dtype", TOP)
def test_a_tokens_bits_do_not_depend_on_the_batch_or_the_program(dtype):
    pool = make_pool(dtype, head_dim=64)
    loc, k, v = random_tokens(pool, 33)
    whole = jax.jit(set_kv_buffer)(pool.buffers[0], loc, k, v)
    alone = pool.buffers[0]
    for token in range(33):
        alone = set_kv_buffer(alone, *(array[token : token + 1] for array in (loc, k, v)))
    for one, other in zip(whole, alone, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(("dtype", "head_dim"), [("int8", 16), ("int8", 64), ("int4", 16), ("int4", 128)])
def test_what_is_set_is_got_within_half_a_step(dtype, head_dim, platform):
    pool = make_pool(dtype, head_num=3, head_dim=head_dim, platform=platform)
    assert pool.kv_size_bytes == sum(part.nbytes for part in jax.tree.leaves(pool.buffers))
    loc, k, v = random_tokens(pool, 9, "bfloat16")
    loc = loc.at[4].set(-1)
    pool.set_kv_buffer(1, loc, k, v)
    keys, values = (np.asarray(half) for half in pool.get_kv_buffer(1))
    assert keys.shape == values.shape == (7 * PAGE, 3, head_dim)
    kept = np.asarray(loc) >= 0
    k, v = (np.asarray(half, np.float32)[kept] for half in (k, v))
    slots = np.asarray(loc)[kept]
    turn = hadamard(head_dim) if dtype == "int4" else np.eye(head_dim)
    assert within(keys[slots] @ turn, k @ turn, dtype)
    assert within(values[slots], v, dtype)
    others = np.setdiff1d(np.arange(7 * PAGE), slots)
    assert not keys[others].any()
    assert not values[others].any()


@pytest.mark.parametrize("dtype", TOP)
def test_of_equal_slots_the_last_wins_for_codes_and_scales(dtype):
    pool = make_pool(dtype)
    _, k, v = random_tokens(pool, 4)
    pool.set_kv_buffer(0, jnp.array([9, 12, 9, 99]), k, v)
    pool.set_kv_buffer(1, jnp.array([12, 9]), k[1:3], v[1:3])
    for one, other in zip(pool.buffers[0], pool.buffers[1], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", TOP)
def test_a_write_is_in_place_without_a_temporary_of_the_buffers_size(dtype):
    pool = make_pool(dtype, size=512 * PAGE, head_dim=64)
    loc, k, v = random_tokens(pool, 4)
    program = jax.jit(set_kv_buffer, donate_argnums=0).lower(pool.buffers[0], loc, k, v).compile()
    usage = program.memory_analysis()
    assert usage.alias_size_in_bytes == pool.kv_size_bytes // 2
    if library.available():
        assert usage.temp_size_in_bytes < pool.buffers[0].scales.nbytes / 2
    before = [part.unsafe_buffer_pointer() for part in jax.tree.leaves(pool.buffers)]
    pool.set_kv_buffer(0, loc, k, v)
    assert [part.unsafe_buffer_pointer() for part in jax.tree.leaves(pool.buffers)] == before


@pytest.mark.parametrize("dtype", TOP)
def test_pages_take_their_scales_with_them(dtype):
    pool = make_pool(dtype)
    for layer_id in range(2):
        pool.set_kv_buffer(layer_id, *random_tokens(pool, 6 * PAGE))
    before = [[np.asarray(half) for half in pool.get_kv_buffer(layer)] for layer in range(2)]
    data = read_pages(pool, [2, 5])
    assert (data.dtype, data.shape[1:]) == (pool.layout.page_dtype, (2, *pool.layout.page_shape))
    assert data.nbytes == 2 * pool.kv_size_bytes // 7
    places = [part.unsafe_buffer_pointer() for part in jax.tree.leaves(pool.buffers)]
    copy_pages(pool, [2], [1])
    write_pages(pool, [3, 2], data)
    assert [part.unsafe_buffer_pointer() for part in jax.tree.leaves(pool.buffers)] == places
    for layer in range(2):
        for old, new in zip(before[layer], pool.get_kv_buffer(layer), strict=True):
            old, new = (np.asarray(half).reshape(7, PAGE, 2, 16) for half in (old, new))
            np.testing.assert_array_equal(new[[1, 3, 2, 4, 5, 6]], old[[2, 2, 5, 4, 5, 6]])


def test_a_narrow_pool_adopts_its_buffers_and_renews_them():
    pool = make_pool("int4")
    buffers = pool.buffers
    again = TokenToKVPool.from_buffers(buffers, PAGE, 2, 16)
    assert again.layout == pool.layout
    assert again.buffers == buffers
    again.set_kv_buffer(0, *random_tokens(pool, 3))
    with pytest.raises(ShapeError, match="donated"):
        pool.get_fused_kv_buffer(0)
    again.renew()
    assert not any(np.asarray(part).any() for part in jax.tree.leaves(again.buffers))
    codes, scales = again.buffers[0]
    with pytest.raises(ShapeError, match="has no scales"):
        TokenToKVPool.from_buffers([jnp.zeros((56, 4, 16), jnp.int8)], PAGE, 2, 16)
    with pytest.raises(ShapeError, match="must be int8, or uint8"):
        TokenToKVPool.from_buffers([NarrowKV(codes.astype(jnp.int32), scales)], PAGE, 2, 16)
    with pytest.raises(ShapeError, match="with scales"):
        TokenToKVPool.from_buffers([NarrowKV(codes, scales[:-1])], PAGE, 2, 16)
    with pytest.raises(ShapeError, match="are not one float32 for each"):
        set_kv_buffer(NarrowKV(codes, scales[:, 1:]), *random_tokens(pool, 3))
    with pytest.raises(ShapeError, match="cannot be quantised"):
        set_kv_buffer(NarrowKV(codes, scales), jnp.zeros(3, jnp.int32), *jnp.ones((2, 3, 2, 16), jnp.int8))


def test_how_many_more_tokens_fit():
    tokens = {name: 1 / layout_of(name).bytes_per_token for name in ("bfloat16", "int8", "int4")}
    assert tokens["int8"] >= 1.9 * tokens["bfloat16"]
    assert tokens["int4"] >= 3.5 * tokens["bfloat16"]
    on_tpu = {name: layout_of(name, platform="tpu") for name in ("int8", "int4")}
    assert on_tpu["int4"].has_pairs
    assert all(layout.bytes_per_token == layout_of(name).bytes_per_token for name, layout in on_tpu.items())
    with pytest.raises(ConfigError, match="head_dim=7 is odd"):
        layout_of("int4", head_dim=7)


def layout_of(dtype, **changes):
    return KVLayout.create(**({"head_num": 8, "head_dim": 128, "page_size": 16, "dtype": dtype} | changes))


@pytest.mark.parametrize("dtype", TOP)
def test_the_descriptor_says_that_there_are_scales(dtype):
    values = layout_of(dtype).to_dict()
    assert (values["dtype"], values["scale_bytes"]) == (dtype, 4)
    assert KVLayout.from_dict(values) == layout_of(dtype)
    with pytest.raises(ConfigError, match="scales of 0 bytes"):
        KVLayout.from_dict(values | {"scale_bytes": 0})
