from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ShapeError
from engine.kv import page_copy
from engine.kv.page_copy import PAGE_BUCKETS, copy_pages, read_pages, write_pages
from engine.kv.pool import TokenToKVPool

DTYPES = ["bfloat16", "float16", "float32", "float8_e5m2"]
LAYERS, HEADS, HEAD_DIM, PAGE_SIZE = 2, 2, 6, 4


def make_pool(rng, *, pages=20, dtype="bfloat16", **options):
    """A pool whose every stored bit is random, the null page and the padding included."""
    pool = TokenToKVPool(pages * PAGE_SIZE, PAGE_SIZE, dtype, HEADS, HEAD_DIM, LAYERS, **options)
    pool.replace_buffers([jnp.array(random_bits(rng, buffer.shape, pool.dtype)) for buffer in pool.buffers])
    return pool


def random_bits(rng, shape, dtype):
    """Every pattern of bits, among them infinities and NaNs of both kinds with any payload."""
    return rng.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8).view(dtype)


def random_pages(rng, pool, count):
    return random_bits(rng, (count, LAYERS, PAGE_SIZE, 2 * HEADS, HEAD_DIM), pool.dtype)


def stored(pool):
    """All bits of the pool by page, ``[layers, pages, page_size, 2H', D' bytes]``."""
    rows = np.stack([np.array(buffer) for buffer in pool.buffers])
    return rows.view(np.uint8).reshape(LAYERS, -1, PAGE_SIZE, pool.layout.rows, pool.layout.lanes * pool.dtype.itemsize)


def addresses(pool):
    return [buffer.unsafe_buffer_pointer() for buffer in pool.buffers]


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.permutations(range(1, 21)), st.sampled_from([0, 1, 3, 4, 7, 8]), st.integers(0, 2**32))
@settings(max_examples=25)
def test_pages_travel_bit_for_bit_and_nothing_else_changes(dtype, order, count, seed):
    rng = np.random.default_rng(seed)
    pool, pages = make_pool(rng, dtype=dtype), order[:count]
    before, places, data = stored(pool), addresses(pool), random_pages(rng, pool, count)
    read = read_pages(pool, pages)
    assert (read.dtype, read.shape) == (pool.dtype, data.shape)
    assert np.array_equal(read.view(np.uint8), before[:, pages].swapaxes(0, 1))
    assert np.array_equal(stored(pool), before)
    write_pages(pool, pages, data)
    before[:, pages] = data.view(np.uint8).swapaxes(0, 1)
    assert np.array_equal(stored(pool), before)
    half = count // 2
    copy_pages(pool, pages[:half], pages[half : 2 * half])
    before[:, pages[half : 2 * half]] = before[:, pages[:half]]
    assert np.array_equal(stored(pool), before)
    assert addresses(pool) == places


def test_more_pages_than_the_largest_bucket(rng):
    count = 2 * PAGE_BUCKETS[-1] + 3
    pool = make_pool(rng, pages=2 * count)
    pages = rng.permutation(2 * count) + 1
    data, before = random_pages(rng, pool, count), stored(pool)
    write_pages(pool, pages[:count], data)
    copy_pages(pool, pages[:count], pages[count:])
    before[:, pages] = np.concatenate([data, data]).view(np.uint8).swapaxes(0, 1)
    assert np.array_equal(stored(pool), before)
    assert np.array_equal(read_pages(pool, pages[count:]).view(np.uint8), data.view(np.uint8))


def test_one_source_may_have_many_targets(rng):
    pool = make_pool(rng)
    before = stored(pool)
    copy_pages(pool, [3, 3, 3], [5, 6, 7])
    before[:, 5:8] = before[:, 3:4]
    assert np.array_equal(stored(pool), before)


def test_storage_padded_for_a_tpu_gives_and_takes_unpadded_pages(rng):
    pool, plain = make_pool(rng, platform="tpu"), make_pool(rng)
    data = random_pages(rng, pool, 3)
    for each in (pool, plain):
        write_pages(each, [2, 9, 4], data)
        copy_pages(each, [2], [11])
        assert np.array_equal(read_pages(each, [2, 9, 4, 11]).view(np.uint8), data[[0, 1, 2, 0]].view(np.uint8))
    padding = stored(pool)[:, [2, 9, 4, 11]].view(pool.dtype)
    assert not padding[..., 2 * HEADS :, :].any()
    assert not padding[..., HEAD_DIM:].any()


def test_the_caller_s_array_may_change_at_once(rng):
    # Large enough to be still under way when the call returns, and aligned, so that jax could take it as it is.
    pool = TokenToKVPool(64 * 64, 64, "bfloat16", 8, 128, 2)
    shape = (64, 2, 64, 16, 128)
    room = np.zeros(2 * int(np.prod(shape)) + 64, np.uint8)
    aligned = room[-room.ctypes.data % 64 :][: room.size - 64].view(np.uint64)
    kept = rng.integers(0, 2**64, aligned.shape, np.uint64)
    for _ in range(3):
        aligned[:] = kept
        write_pages(pool, range(1, 65), aligned.view(pool.dtype).reshape(shape))
        aligned[:] = 0
        assert np.array_equal(read_pages(pool, range(1, 65)).reshape(-1).view(np.uint64), kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_copies_are_in_place_with_memory_for_the_pages_alone(dtype):
    pool = TokenToKVPool(16 * 512, 16, dtype, 4, 64, 2)
    pages = jax.ShapeDtypeStruct((8,), jnp.int32)
    page_bytes = pool.kv_size_bytes // 513
    data = jax.ShapeDtypeStruct((8, 2, 16, 8, 64), page_copy._bits_of(pool))
    for program, arguments, aliased in [
        (page_copy._gather, (pool, pages), 0),
        (page_copy._scatter, (pool, pages, data), pool.kv_size_bytes),
        (page_copy._copy, (pool, pages, pages), pool.kv_size_bytes),
    ]:
        compiled = program.lower(*arguments).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes == aliased
        # k and v of each layer once, and once more as they were gathered; a buffer alone would be 256 pages.
        assert memory.temp_size_in_bytes <= 3 * 8 * page_bytes
        assert " convert(" not in compiled.as_text()


def test_a_tpu_never_sees_a_whole_buffer_as_integers():
    pool = TokenToKVPool(16 * 512, 16, "bfloat16", 4, 128, 1, platform="tpu")
    pages = jax.ShapeDtypeStruct((8,), jnp.int32)
    for program, arguments in [(page_copy._gather, (pool, pages)), (page_copy._copy, (pool, pages, pages))]:
        text = program.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
        assert "513x16x8x128xbf16" in text
        assert "513x16x8x128xui16" not in text


def test_steady_state_compiles_nothing(rng):
    pool = make_pool(rng, pages=300)
    programs = (page_copy._gather, page_copy._scatter, page_copy._copy)

    def use(count):
        write_pages(pool, range(1, count + 1), read_pages(pool, range(1, count + 1)))
        copy_pages(pool, range(1, count + 1), range(151, 151 + count))

    for bucket in PAGE_BUCKETS:
        use(bucket)
    compiled = [program._cache_size() for program in programs]
    for count in [3, 5, 7, 9, 31, 33, 63, 65, 100, 149]:
        use(count)
    assert [program._cache_size() for program in programs] == compiled


def test_a_copy_through_pinned_memory_keeps_every_bit(rng):
    pool = make_pool(rng)
    bits = page_copy._gather(pool, np.arange(1, 9, dtype=np.int32))
    pinned = page_copy._to_pinned(bits)
    assert pinned.sharding.memory_kind == "pinned_host"
    assert np.array_equal(np.asarray(pinned), np.asarray(bits))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda pool, data: write_pages(pool, [1, 2, 21], data),
            r"pages \[21\] are not pages of this pool, .* 1 to 20",
        ),
        (lambda pool, data: write_pages(pool, [1, 0, 2], data), r"pages \[0\]"),
        (lambda pool, data: write_pages(pool, [1, -1, 2], data), r"pages \[-1\]"),
        (lambda pool, data: write_pages(pool, [1, 2, 1], data), r"pages \[1\] would be written twice"),
        (lambda pool, data: write_pages(pool, [1.0, 2.0, 3.0], data), "integer page ids"),
        (lambda pool, data: write_pages(pool, [[1, 2, 3]], data), "vector"),
        (lambda pool, data: write_pages(pool, [1, 2], data), "does not fill 2 pages"),
        (lambda pool, data: write_pages(pool, [1, 2, 3], data[:, :, :2]), r"must be bfloat16\[3, 2, 4, 4, 6\]"),
        (lambda pool, data: write_pages(pool, [1, 2, 3], data.view(np.float16)), "float16"),
        (lambda pool, data: read_pages(pool, [0]), r"pages \[0\]"),
        (lambda pool, data: read_pages(pool, [2**31 + 1]), r"pages \[2147483649\]"),
        (lambda pool, data: copy_pages(pool, [1], [0]), r"targets \[0\]"),
        (lambda pool, data: copy_pages(pool, [22], [1]), r"sources \[22\]"),
        (lambda pool, data: copy_pages(pool, [1, 2], [3]), "2 pages to 1"),
        (lambda pool, data: copy_pages(pool, [1, 2], [3, 3]), r"targets \[3\] would be written twice"),
        (lambda pool, data: copy_pages(pool, [1, 2], [3, 1]), r"\[1\] are both source and target"),
    ],
)
def test_a_refused_call_changes_nothing(rng, call, message):
    pool = make_pool(rng)
    buffers, before = pool.buffers, stored(pool)
    with pytest.raises(ShapeError, match=message):
        call(pool, random_pages(rng, pool, 3))
    assert pool.buffers is buffers
    assert np.array_equal(stored(pool), before)


def test_a_pool_split_over_a_mesh_gives_and_takes_whole_pages():
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import jax, numpy as np
from test_page_copy import *
rng = np.random.default_rng()
mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
pool = TokenToKVPool(20 * PAGE_SIZE, PAGE_SIZE, "bfloat16", HEADS, HEAD_DIM, LAYERS, mesh)
shardings, before = [buffer.sharding for buffer in pool.buffers], stored(pool)
data = random_pages(rng, pool, 5)
write_pages(pool, [7, 3, 20, 1, 2], data)
copy_pages(pool, [7, 3], [8, 9])
before[:, [7, 3, 20, 1, 2, 8, 9]] = data[[0, 1, 2, 3, 4, 0, 1]].view(np.uint8).swapaxes(0, 1)
assert np.array_equal(stored(pool), before)
assert np.array_equal(read_pages(pool, [20, 8]).view(np.uint8), data[[2, 0]].view(np.uint8))
assert all(buffer.sharding.is_equivalent_to(old, 3) for buffer, old in zip(pool.buffers, shardings))
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
