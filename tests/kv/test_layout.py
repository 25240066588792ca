"""The one law: head h's K is row 2h and its V is row 2h + 1, whatever the packing and padding."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError, ShapeError
from engine.kv import layout
from engine.kv.layout import KVLayout, extract_k_from_fused_kv, extract_v_from_fused_kv, merge_kv

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"]


def random_kv(shape, dtype, seed=None):
    rng = np.random.default_rng(seed)
    values = rng.integers(-100, 100, (2, *shape)) if dtype == "int8" else rng.standard_normal((2, *shape))
    k, v = values.astype(jnp.dtype(dtype))  # in NumPy, which compiles nothing
    return jnp.asarray(k), jnp.asarray(v)


def interleave_by_hand(k, v):
    """The tpu_commons v3 rule, one element at a time, for k, v of [T, H, D]."""
    tokens, heads, head_dim = k.shape
    fused = np.empty((tokens, 2 * heads, head_dim), k.dtype)
    for t in range(tokens):
        for h in range(heads):
            for d in range(head_dim):
                fused[t, 2 * h, d] = k[t, h, d]
                fused[t, 2 * h + 1, d] = v[t, h, d]
    return fused


def pack_by_hand(k, v, page_size):
    """The cache of the v3 kernel, one element at a time: row r of a token is word r // p, part r % p."""
    tokens, heads, head_dim = k.shape
    pack = 32 // (8 * k.dtype.itemsize)
    words, lanes = -(-2 * heads // pack), -(-head_dim // 128) * 128
    packed = np.zeros((tokens // page_size, page_size, words, pack, lanes), k.dtype)
    for t in range(tokens):
        for h in range(heads):
            for kind, source in enumerate((k, v)):
                row = 2 * h + kind
                packed[t // page_size, t % page_size, row // pack, row % pack, :head_dim] = source[t, h]
    return packed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 4), (5, 1, 8), (4, 8, 16)])
def test_merge_equals_an_independent_statement_of_the_v3_rule(shape, dtype):
    k, v = random_kv(shape, dtype)
    fused = merge_kv(k, v)
    assert fused.dtype == k.dtype
    np.testing.assert_array_equal(np.asarray(fused), interleave_by_hand(np.asarray(k), np.asarray(v)))


def test_rows_are_k0_v0_k1_v1():
    k = jnp.stack([jnp.full((4,), 10.0 * h) for h in range(3)])[None]
    rows = np.asarray(merge_kv(k, k + 1))[0, :, 0]
    np.testing.assert_array_equal(rows, [0, 1, 10, 11, 20, 21])


@settings(max_examples=20)  # each new shape compiles
@given(
    leading=st.lists(st.integers(1, 3), max_size=3),
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
)
def test_round_trip_over_any_leading_axes(leading, heads, head_dim, dtype):
    k, v = random_kv((*leading, heads, head_dim), dtype)
    fused = merge_kv(k, v)
    assert fused.shape == (*leading, 2 * heads, head_dim)
    np.testing.assert_array_equal(np.asarray(extract_k_from_fused_kv(fused)), np.asarray(k))
    np.testing.assert_array_equal(np.asarray(extract_v_from_fused_kv(fused)), np.asarray(v))


def obeys_the_law(merge, extract_k, extract_v):
    """Whether three functions state the rule: what the tests above check, for any candidate."""
    k, v = random_kv((3, 4, 8), "float32")
    fused = merge(k, v)
    right = interleave_by_hand(np.asarray(k), np.asarray(v))
    return np.array_equal(fused, right) and np.array_equal(extract_k(right), k) and np.array_equal(extract_v(right), v)


def test_our_functions_obey_the_law():
    assert obeys_the_law(merge_kv, extract_k_from_fused_kv, extract_v_from_fused_kv)


@pytest.mark.parametrize(
    "mutant",
    [
        # The mistake that the seed corrects: K and V side by side along head_dim.
        {"merge": lambda k, v: jnp.concatenate([k, v], axis=-1)},
        {"extract_k": lambda fused: fused[..., : fused.shape[-1] // 2]},
        {"extract_v": lambda fused: fused[..., fused.shape[-1] // 2 :]},
        # The same in the right shape, elements of K and V in turn, all keys before all values, V before K.
        {"merge": lambda k, v: jnp.concatenate([k, v], axis=-1).reshape(3, 8, 8, order="F")},
        {"merge": lambda k, v: jnp.stack([k, v], axis=-1).reshape(3, 8, 8)},
        {"merge": lambda k, v: jnp.concatenate([k, v], axis=-2)},
        {"merge": lambda k, v: merge_kv(v, k)},
        {"extract_k": lambda fused: fused[..., : fused.shape[-2] // 2, :]},
        {"extract_v": extract_k_from_fused_kv},
    ],
)
def test_any_other_split_breaks_the_law(mutant):
    ours = {"merge": merge_kv, "extract_k": extract_k_from_fused_kv, "extract_v": extract_v_from_fused_kv}
    assert not obeys_the_law(**(ours | mutant))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 128), (1, 64), (2, 80), (3, 128), (4, 256)])
def test_packed_view_equals_an_independent_statement_of_the_v3_cache(heads, head_dim, dtype):
    k, v = random_kv((6, heads, head_dim), dtype)
    fused = merge_kv(k, v)
    packed = layout.pack_pages(fused, page_size=3)
    np.testing.assert_array_equal(np.asarray(packed), pack_by_hand(np.asarray(k), np.asarray(v), 3))
    np.testing.assert_array_equal(np.asarray(layout.unpack_pages(packed, 2 * heads, head_dim)), np.asarray(fused))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (8, 128), (10, 80), (5, 256)])
def test_tpu_storage_packs_without_moving_a_byte(heads, head_dim, dtype):
    stored = KVLayout.create(head_num=heads, head_dim=head_dim, dtype=dtype, page_size=2, platform="tpu")
    k, v = random_kv((4, heads, head_dim), dtype)
    buffer = layout.pad_fused(merge_kv(k, v), stored.rows, stored.lanes)
    packed = layout.pack_pages(buffer, page_size=2)
    assert np.asarray(packed).tobytes() == np.asarray(buffer).tobytes()
    fused = layout.unpad_fused(buffer, heads, head_dim)
    np.testing.assert_array_equal(np.asarray(fused), np.asarray(merge_kv(k, v)))


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "rows", "lanes"),
    [
        (1, 128, "bfloat16", 2, 128),
        (2, 128, "bfloat16", 4, 128),
        (8, 128, "bfloat16", 16, 128),
        (8, 128, "float32", 16, 128),
        (8, 256, "bfloat16", 16, 256),
        (8, 64, "bfloat16", 16, 128),
        (10, 128, "bfloat16", 32, 128),
        (1, 128, "float8_e4m3fn", 4, 128),
        (8, 80, "bfloat16", 16, 128),
        (3, 128, "float32", 8, 128),
    ],
)
def test_tpu_padding_is_what_xla_tiles_freely(heads, head_dim, dtype, rows, lanes):
    stored = KVLayout.create(head_num=heads, head_dim=head_dim, dtype=dtype, page_size=16, platform="tpu")
    assert (stored.rows, stored.lanes) == (rows, lanes)
    assert stored.bytes_per_token == rows * lanes * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_only_a_tpu_pads(platform):
    stored = KVLayout.create(head_num=5, head_dim=80, dtype="bfloat16", page_size=16, platform=platform)
    assert stored.buffer_shape(48) == (48, 10, 80)
    assert stored.bytes_per_token == 2 * 5 * 80 * 2
    assert stored.padding_overhead == 0


def test_padding_overhead_is_stated():
    half = KVLayout.create(head_num=1, head_dim=128, dtype="float8_e4m3fn", page_size=16, platform="tpu")
    odd = KVLayout.create(head_num=8, head_dim=80, dtype="bfloat16", page_size=16, platform="tpu")
    assert half.padding_overhead == pytest.approx(1.0)
    assert odd.padding_overhead == pytest.approx(0.6)


def make_layout(**changes):
    settings = {"head_num": 8, "head_dim": 128, "dtype": "bfloat16", "page_size": 16} | changes
    return KVLayout.create(**settings)


def test_equal_layouts_may_exchange_pages():
    make_layout().require_same(make_layout(), "a saved state")


@pytest.mark.parametrize(
    "change",
    [{"head_num": 4}, {"head_dim": 64}, {"dtype": "float16"}, {"page_size": 32}, {"head_dim": 80, "platform": "tpu"}],
)
def test_a_differing_field_is_refused_by_name(change):
    with pytest.raises(ConfigError) as raised:
        make_layout().require_same(make_layout(**change), "a saved state")
    for field in change.keys() - {"platform"}:
        assert f"{field} {change[field]}" in str(raised.value)
    assert "version" not in str(raised.value)


@pytest.mark.parametrize("change", [{"order": "split"}, {"version": 3}])
def test_another_order_or_version_is_refused(change):
    other = dataclasses.replace(make_layout(), **change)
    with pytest.raises(ConfigError, match=next(iter(change))):
        make_layout().require_same(other, "a peer")
    with pytest.raises(ConfigError, match="cannot be read"):
        KVLayout.from_dict(other.to_dict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_descriptor_survives_json(dtype):
    written = make_layout(dtype=dtype, platform="tpu")
    assert KVLayout.from_dict(json.loads(json.dumps(written.to_dict()))) == written


def test_incomplete_descriptor_is_refused():
    values = make_layout().to_dict()
    del values["rows"]
    with pytest.raises(ConfigError, match="rows"):
        KVLayout.from_dict(values | {"colour": 1})


@pytest.mark.parametrize("bad", [{"head_num": 0}, {"head_dim": -1}, {"page_size": 0}, {"dtype": "bool"}])
def test_impossible_layout_is_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        make_layout(**bad)


def test_unfit_arrays_are_refused():
    k = jnp.ones((2, 3, 4))
    for v in (jnp.ones((2, 3, 5)), jnp.ones((2, 3, 4), jnp.bfloat16)):
        with pytest.raises(ShapeError, match="cannot merge"):
            merge_kv(k, v)
    for extract in (extract_k_from_fused_kv, extract_v_from_fused_kv):
        with pytest.raises(ShapeError, match="cannot extract"):
            extract(k)
    with pytest.raises(ShapeError, match="pages of 2"):
        layout.pack_pages(jnp.ones((3, 2, 4)), 2)
    with pytest.raises(ShapeError, match="padding only adds"):
        layout.pad_fused(k, 2, 4)


@pytest.mark.parametrize("shape", [(8, 4, 16), (8, 4, 128)])
def test_storage_is_accepted_as_it_is_or_padded(shape):
    layout.check_storage(jnp.ones(shape, jnp.bfloat16), 2, 16)


@pytest.mark.parametrize("shape", [(8, 4), (8, 6, 16), (8, 2, 16), (8, 4, 32), (8, 8, 128), (8, 2, 128)])
def test_storage_of_other_heads_is_refused(shape):
    with pytest.raises(ShapeError):
        layout.check_storage(jnp.ones(shape, jnp.bfloat16), 2, 16)
