"""The pool: its bytes, its buffers as a pytree, and writes that stay in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from engine.errors import ConfigError, ShapeError
from engine.kv.layout import KVLayout, merge_kv
from engine.kv.pool import TokenToKVPool
from engine.native import library


def make_pool(**changes):
    settings = {"size": 32, "page_size": 8, "dtype": "bfloat16", "head_num": 2, "head_dim": 16, "layer_num": 3}
    return TokenToKVPool(**(settings | changes))


def random_tokens(pool, count):
    rng = np.random.default_rng()
    loc = rng.choice(np.arange(pool.page_size, pool.size + pool.page_size), count, replace=False)
    k, v = rng.standard_normal((2, count, pool.layout.head_num, pool.layout.head_dim))
    return jnp.asarray(loc), jnp.asarray(k.astype(pool.dtype)), jnp.asarray(v.astype(pool.dtype))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_bytes_are_those_of_the_buffers(dtype, platform):
    pool = make_pool(dtype=dtype, head_num=3, head_dim=80, platform=platform)
    assert pool.layer_num == len(pool.buffers) == 3
    assert pool.kv_size_bytes == sum(buffer.nbytes for buffer in pool.buffers)
    assert pool.get_fused_kv_buffer(0).shape == pool.layout.buffer_shape(32 + 8)
    assert pool.dtype == pool.get_fused_kv_buffer(0).dtype


def test_cpu_storage_is_the_contracts_shape():
    pool = make_pool()
    assert pool.get_fused_kv_buffer(2).shape == (40, 4, 16)
    assert (pool.size, pool.page_size, pool.dtype) == (32, 8, jnp.bfloat16)
    assert not np.asarray(pool.get_fused_kv_buffer(1)).any()


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_what_is_set_is_got(platform):
    pool = make_pool(platform=platform)
    loc, k, v = random_tokens(pool, 5)
    pool.set_kv_buffer(1, loc, k, v)
    keys, values = pool.get_kv_buffer(1)
    assert keys.shape == values.shape == (40, 2, 16)
    np.testing.assert_array_equal(np.asarray(keys[loc]), np.asarray(k))
    np.testing.assert_array_equal(np.asarray(values[loc]), np.asarray(v))
    others = np.setdiff1d(np.arange(40), np.asarray(loc))
    assert not np.asarray(keys)[others].any()
    assert not np.asarray(values)[others].any()
    assert not np.asarray(pool.get_fused_kv_buffer(0)).any()
    assert not np.asarray(pool.get_fused_kv_buffer(2)).any()


def test_a_write_stays_at_its_address_and_compiles_once():
    pool = make_pool(size=64, layer_num=2)
    addresses = [buffer.unsafe_buffer_pointer() for buffer in pool.buffers]
    pool.set_kv_buffer(0, *random_tokens(pool, 4))
    batches = [random_tokens(pool, 4) for _ in range(6)]
    assert count_compiles(lambda: [pool.set_kv_buffer(i % 2, *batch) for i, batch in enumerate(batches)]) == 0
    assert [buffer.unsafe_buffer_pointer() for buffer in pool.buffers] == addresses


def count_compiles(work):
    """Programs that XLA compiles during ``work``, from the events that jax reports."""
    seen = []

    def listen(event, duration, **kwargs):
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        work()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(seen)


def test_the_pool_goes_through_a_donating_jit_in_place():
    pool = make_pool()
    loc, k, v = random_tokens(pool, 4)

    def step(pool, loc, k, v):
        for layer_id in range(pool.layer_num):
            pool.set_kv_buffer(layer_id, loc, k * (layer_id + 1), v)
        return pool

    addresses = [buffer.unsafe_buffer_pointer() for buffer in pool.buffers]
    program = jax.jit(step, donate_argnums=0).lower(pool, loc, k, v).compile()
    assert program.memory_analysis().alias_size_in_bytes == pool.kv_size_bytes
    if library.available():
        assert program.memory_analysis().temp_size_in_bytes < pool.kv_size_bytes / 4
    old = pool.buffers
    pool = program(pool, loc, k, v)
    assert all(buffer.is_deleted() for buffer in old)
    assert [buffer.unsafe_buffer_pointer() for buffer in pool.buffers] == addresses
    for layer_id in range(3):
        wanted = np.asarray(merge_kv(k * (layer_id + 1), v))
        np.testing.assert_array_equal(np.asarray(pool.get_fused_kv_buffer(layer_id)[loc]), wanted)


def test_as_a_pytree_it_is_its_buffers():
    pool = make_pool()
    leaves, tree = jax.tree.flatten(pool)
    assert [leaf is buffer for leaf, buffer in zip(leaves, pool.buffers, strict=True)] == [True] * 3
    again = jax.tree.unflatten(tree, leaves)
    assert (again.size, again.layout, again.buffers) == (pool.size, pool.layout, pool.buffers)
    abstract = jax.eval_shape(lambda pool: pool, pool)
    assert abstract.get_fused_kv_buffer(0).shape == (40, 4, 16)
    assert jax.tree.structure(make_pool()) == tree
    assert jax.tree.structure(make_pool(page_size=16)) != tree


def test_replaced_buffers_are_checked_before_any_is_taken():
    pool = make_pool()
    before = pool.buffers
    fresh = [jnp.ones_like(buffer) for buffer in before]
    assert pool.replace_buffers(fresh) is pool
    assert pool.buffers == tuple(fresh)
    for wrong in (fresh[:2], [*fresh[:2], fresh[2][:-1]], [*fresh[:2], fresh[2].astype(jnp.float16)]):
        with pytest.raises(ShapeError):
            pool.replace_buffers(wrong)
        assert pool.buffers == tuple(fresh)


@pytest.mark.parametrize(
    ("bad", "hint"),
    [
        ({"size": 33}, "use 32 or 40"),
        ({"size": 0}, "use 8 or more"),
        ({"size": -8}, "use 8 or more"),
        ({"size": 7}, "use 8 or more"),
        ({"page_size": 0}, "page_size=0"),
        ({"layer_num": 0}, "layer_num=0"),
        ({"head_num": 0}, "head_num=0"),
        ({"dtype": "bool"}, "dtype bool"),
    ],
)
def test_an_impossible_pool_is_refused(bad, hint):
    with pytest.raises(ConfigError, match=hint):
        make_pool(**bad)


@pytest.mark.parametrize("layer_id", [-1, 3])
def test_an_unknown_layer_is_refused(layer_id):
    pool = make_pool()
    for call in (
        lambda: pool.get_fused_kv_buffer(layer_id),
        lambda: pool.get_kv_buffer(layer_id),
        lambda: pool.set_kv_buffer(layer_id, *random_tokens(pool, 2)),
    ):
        with pytest.raises(ConfigError, match=f"layer_id={layer_id}"):
            call()


def test_tokens_of_another_model_are_refused_and_nothing_changes():
    pool = make_pool(head_dim=128, head_num=4)
    before = pool.buffers
    loc, k, v = random_tokens(pool, 2)
    with pytest.raises(ShapeError, match=r"\[tokens, 4, 128\]"):
        pool.set_kv_buffer(0, loc, k[:, :3], v[:, :3])
    with pytest.raises(ShapeError):
        pool.set_kv_buffer(0, loc[:1], k, v)
    assert pool.buffers is before
    assert not any(buffer.is_deleted() for buffer in before)


def test_padding_is_never_seen():
    plain, padded = make_pool(platform="cpu"), make_pool(platform="tpu")
    assert padded.layout == KVLayout.create(head_num=2, head_dim=16, dtype="bfloat16", page_size=8, platform="tpu")
    assert padded.get_fused_kv_buffer(0).shape == (40, 4, 128)
    tokens = random_tokens(plain, 6)
    for pool in (plain, padded):
        pool.set_kv_buffer(0, *tokens)
    for ours, theirs in zip(plain.get_kv_buffer(0), padded.get_kv_buffer(0), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_mesh_needs_an_axis_for_the_heads():
    with pytest.raises(ConfigError, match="tensor"):
        make_pool(mesh=Mesh(np.array(jax.devices()[:1]), ("data",)))


def test_a_mesh_of_one_device_is_a_pool_like_any():
    pool = make_pool(mesh=Mesh(np.array(jax.devices()[:1]), ("tensor",)))
    loc, k, v = random_tokens(pool, 3)
    pool.set_kv_buffer(0, loc, k, v)
    np.testing.assert_array_equal(np.asarray(pool.get_fused_kv_buffer(0)[loc]), np.asarray(merge_kv(k, v)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "foo"}, "dtype='foo' of a KV pool is not known"),
        ({"dtype": jnp.int2}, "cannot store dtype int2"),
        ({"dtype": np.float64}, "needs jax_enable_x64"),
        ({"dtype": np.complex64}, "cannot store dtype complex64"),
        ({"head_num": 2.5}, "head_num=2.5"),
        ({"size": 16.0}, "size=16.0"),
        ({"layer_num": True}, "layer_num=True"),
    ],
)
def test_a_pool_of_nonsense_is_refused(wrong: dict[str, object], message: str) -> None:
    sizes = {"size": 16, "page_size": 4, "dtype": jnp.float32, "head_num": 2, "head_dim": 4, "layer_num": 1}
    with pytest.raises(ConfigError, match=message):
        TokenToKVPool(**{**sizes, **wrong})


def test_a_write_keeps_no_hold_of_its_numpy_arguments() -> None:
    pool = TokenToKVPool(1024, 16, jnp.float32, 4, 64, 1)
    room = np.empty(512 * 4 * 64 + 16, np.float32)
    start = -room.ctypes.data % 64 // 4  # an aligned buffer is one that the CPU backend may alias
    k = room[start : start + 512 * 4 * 64].reshape(512, 4, 64)
    k[:] = np.random.default_rng(0).normal(size=k.shape)
    want, loc = k.copy(), np.arange(16, 528, dtype=np.int32)
    pool.set_kv_buffer(0, loc, k, k)
    k[:], loc[:] = np.nan, -1
    np.testing.assert_array_equal(pool.get_kv_buffer(0)[0][16:528], want)


def test_a_pool_adopts_buffers_that_exist_where_they_are():
    rng = np.random.default_rng()
    buffers = [jnp.asarray(rng.normal(size=(24, 4, 8)), jnp.float32) for _ in range(2)]
    before, pointers = [np.array(b) for b in buffers], [b.unsafe_buffer_pointer() for b in buffers]
    pool = TokenToKVPool.from_buffers(buffers, 8, 2, 8)
    assert (pool.size, pool.page_size, pool.layer_num, pool.dtype) == (16, 8, 2, np.float32)
    k, v = (jnp.asarray(rng.normal(size=(3, 2, 8)), jnp.float32) for _ in range(2))
    pool.set_kv_buffer(1, jnp.array([8, 9, 23]), k, v)
    assert [b.unsafe_buffer_pointer() for b in pool.buffers] == pointers
    np.testing.assert_array_equal(pool.buffers[0], before[0])
    np.testing.assert_array_equal(pool.get_kv_buffer(1)[1][jnp.array([8, 9, 23])], v)
    padded = TokenToKVPool(16, 8, jnp.bfloat16, 5, 80, 1, platform="tpu")
    assert TokenToKVPool.from_buffers(padded.buffers, 8, 5, 80, platform="tpu").layout == padded.layout


@pytest.mark.parametrize(
    ("buffers", "error", "message"),
    [
        ([], ConfigError, "the number of buffers=0"),
        ([np.zeros((24, 4, 8), np.float32)], ShapeError, "must be a JAX array"),
        ([jnp.ones((24, 4, 8)), jnp.ones((16, 4, 8))], ShapeError, r"buffer 1 is float32\[16, 4, 8\]"),
        ([jnp.ones((24, 4, 8)), jnp.ones((24, 4, 8), jnp.bfloat16)], ShapeError, "buffer 1 is bfloat16"),
        ([jnp.ones((24, 6, 8))], ShapeError, r"the pool's are float32\[24, 4, 8\]"),
        ([jnp.ones((8, 4, 8))], ConfigError, "size=0"),
        ([jnp.ones((20, 4, 8))], ConfigError, "multiple of page_size=8"),
        ([jnp.ones((24, 32))], ShapeError, "must be a JAX array"),
    ],
)
def test_buffers_that_no_pool_would_make_are_not_adopted(buffers, error, message):
    with pytest.raises(error, match=message):
        TokenToKVPool.from_buffers(buffers, 8, 2, 8)


@pytest.mark.parametrize("layer_id", [True, 0.0, "0", None, 2, -1])
def test_a_layer_that_is_none_is_refused(layer_id):
    pool = TokenToKVPool(16, 8, jnp.float32, 2, 8, 2)
    with pytest.raises(ConfigError, match="layer_id="):
        pool.get_fused_kv_buffer(layer_id)


@pytest.mark.parametrize("slot", [2**32 + 9, -(2**32) + 9, 2**63 - 1])
def test_a_slot_beyond_32_bits_does_not_wrap_into_the_pool(slot: int) -> None:
    pool = make_pool()
    _, k, v = random_tokens(pool, 1)
    pool.set_kv_buffer(1, np.array([slot]), k, v)
    assert not np.asarray(pool.get_fused_kv_buffer(1)).any()
