"""What foreign code does to attention, scatter and pool: strict modes, padding of its own, traces, vmap, no arrays."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_impls import ALL
from attention_oracle import Geometry, make_case, relative_error, same_bits

from engine import (
    AttentionMetadata,
    ConfigError,
    FlashAttentionBackend,
    ShapeError,
    TokenToKVPool,
    copy_pages,
    ragged_paged_attention,
    read_pages,
    set_kv_buffer,
)
from engine.attention.checks import Array

GEOMETRY = Geometry()
TOLERANCE = 1e-5  # float32 sums of up to 96 terms of order 1, against float64


def case_of(q_lens=(10, 0, 1, 23), prefix_lens=(5, 40, 30, 0), **changes):
    return make_case(
        Geometry(**changes), list(q_lens), list(prefix_lens), seed=int(np.random.default_rng().integers(2**31))
    )


def call(case, impl, **changes):
    arguments = {"q": case.q, "k": case.k, "v": case.v, "fused_kv": case.pool, **case.arguments(), **changes}
    on_device = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    return ragged_paged_attention(**on_device, impl=impl)


def traced(case, impl, **changes):
    """The same, with everything but the options traced."""
    given = {"q": case.q, "k": case.k, "v": case.v, "fused_kv": case.pool, **case.arguments(), **changes}
    arrays = {name: x for name, x in given.items() if isinstance(x, np.ndarray | jax.Array)}
    options = {name: x for name, x in given.items() if name not in arrays}
    return jax.jit(lambda arrays: ragged_paged_attention(**arrays, **options, impl=impl))(arrays)


def check(result, case):
    assert relative_error(result[0], case.expected_out()) < TOLERANCE
    assert same_bits(result[1], case.expected_pool())


STRICT = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "nan": lambda: jax.debug_nans(True),
    "infs": lambda: jax.debug_infs(True),
    "tracer leaks": jax.checking_leaks,
    "transfers": lambda: jax.transfer_guard("disallow"),
}


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("mode", STRICT)
def test_attention_runs_in_every_strict_mode_of_jax(mode, impl):
    case = case_of(sinks=True, soft_cap=20.0, window=32, scales=True)
    given = {"q": case.q, "k": case.k, "v": case.v, "fused_kv": case.pool, **case.arguments()}
    arrays = {name: jax.device_put(x) for name, x in given.items() if isinstance(x, np.ndarray)}
    options = {name: x for name, x in given.items() if name not in arrays}
    attend = jax.jit(lambda arrays: ragged_paged_attention(**arrays, **options, impl=impl))
    with STRICT[mode]():
        out, fused = attend(arrays)
        jax.block_until_ready((out, fused))
    assert relative_error(out, case.expected_out()) < TOLERANCE
    assert same_bits(fused, case.expected_pool())


@pytest.mark.parametrize("mode", STRICT)
def test_the_pool_runs_in_every_strict_mode_of_jax(mode):
    keys = jax.random.split(jax.random.key(int(np.random.default_rng().integers(2**31))))
    k, v = (jax.random.normal(key, (6, 2, 8)) for key in keys)
    loc = jnp.arange(4, 10, dtype=jnp.int32)
    no_numpy = contextlib.nullcontext() if mode == "transfers" else None
    with STRICT[mode]():
        pool = TokenToKVPool(16, 4, jnp.float32, 2, 8, 2)
        pool.set_kv_buffer(1, loc, k, v)
        if no_numpy is None:
            copy_pages(pool, [1, 2], [3, 4])
            first, copied = read_pages(pool, [1, 3])
            assert same_bits(first, copied)
        keys_read, values_read = pool.get_kv_buffer(1)
    assert same_bits(keys_read[4:10], k)
    assert same_bits(values_read[4:10], v)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("run", [call, traced])
def test_running_sums_may_be_padded_with_zeros(run, impl):
    case = case_of(q_lens=(10, 23, 0, 0), prefix_lens=(5, 0, 0, 0))
    padded = case.cu_q_lens.copy()
    padded[3:] = 0  # as others pad it; ours repeats the last value
    check(run(case, impl, cu_q_lens=padded), case)


def test_metadata_may_be_padded_with_zeros_and_pads_itself_to_static_shapes():
    case = case_of(q_lens=(10, 23), prefix_lens=(5, 0), rows=2)
    exact = AttentionMetadata.build(case.page_table, case.cu_q_lens, case.kv_lens, num_tokens=48, page_size=16)
    padded = AttentionMetadata.build(
        case.page_table.tolist(), [0, 10, 33], [15, 23], num_tokens=48, page_size=16, rows=5, columns=9
    )
    assert (padded.page_table.shape, padded.cu_q_lens.tolist()) == ((5, 9), [0, 10, 33, 33, 33, 33])
    by_hand = AttentionMetadata.build(
        np.pad(case.page_table, ((0, 3), (0, 0))), [0, 10, 33, 0, 0, 0], [15, 23, 0, 0, 0], num_tokens=48, page_size=16
    )
    for name in ("out_cache_loc", "positions"):
        np.testing.assert_array_equal(getattr(exact, name), getattr(padded, name))
        np.testing.assert_array_equal(getattr(exact, name), getattr(by_hand, name))
    backend = FlashAttentionBackend(page_size=16, num_q_heads=8, num_kv_heads=2, head_dim=64)
    for metadata in (padded, by_hand):
        check(backend(case.q, case.k, case.v, jnp.array(case.pool), metadata), case)
    with pytest.raises(ShapeError, match=r"page_table is \[2, 6\], more than the 1 rows and 6 columns"):
        AttentionMetadata.build(case.page_table, case.cu_q_lens, case.kv_lens, num_tokens=48, page_size=16, rows=1)


@pytest.mark.parametrize("impl", ALL)
def test_tokens_before_the_first_sequence_are_zeros_and_are_not_written(impl):
    """A traced sum may begin at any number; unwritten memory must never be returned."""
    case = case_of(q_lens=(9, 0, 1, 20), prefix_lens=(5, 40, 30, 0))
    shift = 7
    moved = {name: np.roll(getattr(case, name), shift, axis=0) for name in ("q", "k", "v")}
    expected_out, expected_lse = (np.roll(x, shift, axis=0) for x in case.expected())
    result = traced(case, impl, **moved, cu_q_lens=case.cu_q_lens + shift, return_lse=True)
    dead = np.r_[0:shift, shift + 30 : 48]
    assert not np.asarray(result[0])[dead].any()
    assert np.isneginf(np.asarray(result[2])[dead]).all()
    live = np.r_[shift : shift + 30]
    assert relative_error(np.asarray(result[0])[live], expected_out[live]) < TOLERANCE
    assert relative_error(np.asarray(result[2])[live], expected_lse[live]) < TOLERANCE
    assert same_bits(result[1], case.expected_pool())


@pytest.mark.parametrize("impl", ALL)
def test_wild_metadata_that_is_traced_reaches_no_memory_that_is_not_its_own(impl):
    rng = np.random.default_rng()
    case = case_of(dtype="float32")
    for _ in range(3):
        wild = {
            "page_table": rng.integers(-(2**31), 2**31, case.page_table.shape).astype(np.int32),
            "cu_q_lens": rng.integers(-50, 200, case.cu_q_lens.shape).astype(np.int32),
            "kv_lens": rng.integers(-50, 2**20, case.kv_lens.shape).astype(np.int32),
        }
        out, fused = traced(case, impl, **wild)
        assert np.isfinite(np.asarray(out)).all()
        assert fused.shape == case.pool.shape


@pytest.mark.parametrize("impl", ALL)
def test_a_traced_scale_of_the_logits_is_as_good_as_a_number(impl):
    case = case_of(sm_scale=0.37, sinks=True)
    attend = jax.jit(lambda scale: call(case, impl, sm_scale=scale)[0])
    for scale in (np.float32(0.37), 0.37, jnp.float32(0.37)):
        assert relative_error(attend(scale), case.expected_out()) < TOLERANCE
    for concrete in (np.float64(0.37), jnp.float32(0.37), np.array(0.37)):
        assert relative_error(call(case, impl, sm_scale=concrete)[0], case.expected_out()) < TOLERANCE
    with pytest.raises(ConfigError, match="sm_scale is traced as"):
        jax.jit(lambda scale: call(case, impl, sm_scale=scale))(np.ones(2, np.float32))
    with pytest.raises(ConfigError, match="sm_scale="):
        call(case, impl, sm_scale=np.ones(2))


@pytest.mark.parametrize("impl", ALL)
def test_vmap_of_attention_is_attention_of_each(impl):
    cases = [case_of() for _ in range(3)]
    stacked = {name: np.stack([getattr(c, name) for c in cases]) for name in ("q", "k", "v", "page_table", "kv_lens")}
    pools = np.stack([c.pool for c in cases])

    def attend(q, k, v, fused, page_table, kv_lens):
        return ragged_paged_attention(
            q,
            k,
            v,
            fused,
            page_table=page_table,
            cu_q_lens=cases[0].cu_q_lens,
            kv_lens=kv_lens,
            page_size=16,
            impl=impl,
        )

    out, fused = jax.vmap(attend)(
        *(stacked[name] for name in ("q", "k", "v")), pools, *(stacked[name] for name in ("page_table", "kv_lens"))
    )
    for index, case in enumerate(cases):
        check((out[index], fused[index]), case)
    one = jax.vmap(attend, in_axes=(0, None, None, None, None, None))(
        stacked["q"], cases[0].k, cases[0].v, jnp.array(cases[0].pool), cases[0].page_table, cases[0].kv_lens
    )
    check((one[0][0], one[1][0]), cases[0])


def test_vmap_of_a_scatter_is_a_scatter_of_each():
    rng = np.random.default_rng()
    fused, loc = rng.normal(size=(3, 20, 4, 8)).astype(np.float32), rng.integers(-2, 22, (3, 9))
    k, v = (rng.normal(size=(3, 9, 2, 8)).astype(np.float32) for _ in range(2))
    written = jax.vmap(set_kv_buffer)(fused, loc.astype(np.int32), k, v)
    for index in range(3):
        assert same_bits(written[index], set_kv_buffer(jnp.array(fused[index]), loc[index], k[index], v[index]))


NO_ARRAYS = {
    "q": lambda x: x.tolist(),
    "k": lambda x: None,
    "page_table": lambda x: x.tolist(),
    "cu_q_lens": lambda x: tuple(x.tolist()),
    "kv_lens": lambda x: x.tolist(),
    "fused_kv": lambda x: TokenToKVPool(432, 16, jnp.float32, 2, 64, 1),
}


@pytest.mark.parametrize("name", NO_ARRAYS)
def test_what_is_no_array_is_refused_by_name(name):
    case = case_of()
    given: dict[str, Array] = {"fused_kv": case.pool, **vars(case)}
    with pytest.raises(ShapeError, match=f"{name} is a .*, not an array"):
        call(case, "auto", **{name: NO_ARRAYS[name](given[name])})


def test_a_buffer_of_five_axes_is_refused_by_name():
    case = case_of()
    with pytest.raises(ShapeError, match="fused_kv has shape"):
        call(case, "auto", fused_kv=case.pool.reshape(-1, 16, 2, 2, 64))
    with pytest.raises(ShapeError, match=r"must be \[slots, 2 \* heads, head_dim\]"):
        set_kv_buffer(jnp.array(case.pool.reshape(-1, 16, 2, 2, 64)), np.arange(48), case.k, case.v)


def test_a_donated_buffer_says_what_became_of_it():
    case = case_of()
    fused = jnp.array(case.pool)
    jax.jit(lambda fused: fused + 1, donate_argnums=0)(fused)
    for refused in (
        lambda: call(case, "auto", fused_kv=fused),
        lambda: set_kv_buffer(fused, np.arange(48), case.k, case.v),
        lambda: TokenToKVPool.from_buffers([fused], 16, 2, 64),
    ):
        with pytest.raises(ShapeError, match="was donated to a program"):
            refused()
    pool = TokenToKVPool(32, 16, jnp.float32, 2, 64, 1)
    jax.jit(lambda pool: pool, donate_argnums=0)(pool)
    for refused in (
        lambda: pool.get_fused_kv_buffer(0),
        lambda: pool.get_kv_buffer(0),
        lambda: pool.set_kv_buffer(0, np.arange(48), case.k, case.v),
        lambda: pool.replace_buffers(pool.buffers),
        lambda: read_pages(pool, [1]),
        lambda: copy_pages(pool, [1], [2]),
    ):
        with pytest.raises(ShapeError, match="was donated to a program"):
            refused()


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("wrong", ["page that wraps", "length beyond the table"])
def test_traced_metadata_that_contradicts_itself_writes_into_no_page_of_another(wrong, impl):
    case = case_of()
    pages, lens = case.page_table.copy(), case.kv_lens.copy()
    if wrong == "page that wraps":
        pages[0] = 2**28 + np.arange(1, pages.shape[1] + 1)  # times 16, int32 says pages 1, 2, …
    else:
        lens[0] = pages.shape[1] * 16 + 1000
        pages[0] = case.page_table[1, 0]  # shared with another sequence, which must not be written

    def step(pool, pages, lens):
        changed = {**case.arguments(), "page_table": pages, "kv_lens": lens}
        return ragged_paged_attention(case.q, case.k, case.v, pool, impl=impl, **changed)

    _, written = jax.jit(step)(jnp.array(case.pool), pages, lens)
    kept = np.array(case.expected_pool())
    first = [case.slot(0, case.prefix_lens[0] + i) for i in range(case.q_lens[0])]
    kept[first] = case.pool[first]
    np.testing.assert_array_equal(np.asarray(written), kept)
