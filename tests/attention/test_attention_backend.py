import dataclasses
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Case, Geometry, make_case, same_bits
from attention_strategies import GEOMETRIES, cases
from hypothesis import given, settings

from engine.attention import AttentionMetadata, FlashAttentionBackend, ragged_paged_attention
from engine.attention.metadata import locate_new_tokens


def backend_of(geometry: Geometry, **changes: Any) -> FlashAttentionBackend:
    return FlashAttentionBackend(
        page_size=geometry.page_size,
        num_q_heads=geometry.q_heads,
        num_kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        sliding_window=geometry.window,
        soft_cap=geometry.soft_cap,
        sm_scale=geometry.sm_scale,
        **changes,
    )


def metadata_of(case: Case) -> AttentionMetadata:
    geometry = case.geometry
    return AttentionMetadata.build(
        case.page_table, case.cu_q_lens, case.kv_lens, num_tokens=geometry.tokens, page_size=geometry.page_size
    )


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts on a 64-byte boundary, which the CPU backend takes without copying."""
    store = np.empty(array.nbytes + 64, np.uint8)
    start = -store.ctypes.data % 64
    copy = store[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@given(cases(GEOMETRIES["window"]))
@settings(max_examples=20)
def test_new_tokens_are_where_a_loop_over_tokens_says(case: Case) -> None:
    positions = np.zeros(case.geometry.tokens, np.int32)
    slots = np.full(case.geometry.tokens, -1, np.int32)
    for row, q_len in enumerate(case.q_lens):
        for i in range(q_len):
            positions[case.cu_q_lens[row] + i] = case.prefix_lens[row] + i
            slots[case.cu_q_lens[row] + i] = case.slot(row, case.prefix_lens[row] + i)
    metadata = metadata_of(case)
    assert same_bits(metadata.positions, positions)
    assert same_bits(metadata.out_cache_loc, slots)
    on_device = locate_new_tokens(
        *map(jnp.asarray, (case.page_table, case.cu_q_lens, case.kv_lens)),
        num_tokens=case.geometry.tokens,
        page_size=case.geometry.page_size,
        xp=jnp,
    )
    assert same_bits(on_device[0], positions)
    assert same_bits(on_device[1], slots)


@given(cases(GEOMETRIES["everything_bf16"]))
@settings(max_examples=4)
def test_the_backend_equals_the_function(case: Case) -> None:
    expected = ragged_paged_attention(case.q, case.k, case.v, jnp.array(case.pool), **case.arguments())
    metadata = metadata_of(case)
    backend = backend_of(case.geometry)
    for step in (metadata, metadata.to_device()):
        got = backend(case.q, case.k, case.v, jnp.array(case.pool), step, sinks=case.sinks)
        assert same_bits(got[0], expected[0])
        assert same_bits(got[1], expected[1])


def test_layers_may_differ_in_window() -> None:
    case = make_case(Geometry(), [10, 1, 0, 20], [11, 30, 4, 0], seed=41)
    backend = dataclasses.replace(backend_of(case.geometry), sliding_window=5)
    windowed = dataclasses.replace(case, geometry=dataclasses.replace(case.geometry, window=5))
    got, _ = backend(case.q, case.k, case.v, jnp.array(case.pool), metadata_of(case))
    np.testing.assert_allclose(got, windowed.expected_out(), atol=2e-5)


def test_metadata_is_a_fresh_read_only_copy() -> None:
    case = make_case(Geometry(), [10, 1, 0, 20], [11, 30, 4, 0], seed=42)
    metadata = metadata_of(case)
    for ours, theirs in (
        (metadata.page_table, case.page_table),
        (metadata.cu_q_lens, case.cu_q_lens),
        (metadata.kv_lens, case.kv_lens),
    ):
        assert not np.shares_memory(ours, theirs)
    for leaf in jax.tree.leaves(metadata):
        assert leaf.dtype == np.int32
        with pytest.raises(ValueError, match="read-only"):
            leaf[0] = 7


def test_changing_the_page_table_after_dispatch_does_not_change_the_running_step() -> None:
    case = make_case(Geometry(), [10, 1, 0, 20], [11, 30, 4, 0], seed=43)
    names = ("page_table", "cu_q_lens", "kv_lens")
    hosts = {name: aligned(getattr(case, name)) for name in names}
    backend = backend_of(case.geometry)

    @jax.jit
    def slow_step(pool: jax.Array, metadata: AttentionMetadata) -> jax.Array:
        # Work that delays the reading of the metadata until the host has long returned.
        burn = jax.lax.fori_loop(0, 60, lambda _, x: jnp.tanh(x @ x), jnp.eye(256) + pool[0, 0, 0] * 0)
        return backend(case.q + burn[0, 1] * 0, case.k, case.v, pool, metadata)[0]

    pool = jnp.array(case.pool)
    expected = np.asarray(slow_step(pool, metadata_of(case)))
    for _ in range(5):
        out = slow_step(
            pool,
            AttentionMetadata.build(**hosts, num_tokens=case.geometry.tokens, page_size=case.geometry.page_size),
        )
        for name in names:
            hosts[name][...] = 1
        assert same_bits(out, expected)
        for name in names:
            hosts[name][...] = getattr(case, name)


def test_padding_equals_no_padding() -> None:
    geometry = Geometry(rows=2, tokens=40)
    case = make_case(geometry, [30, 1], [20, 7], seed=44)
    wide = dataclasses.replace(geometry, rows=6, tokens=64, columns=9)
    plain = ragged_paged_attention(case.q, case.k, case.v, jnp.array(case.pool), **case.arguments())[0]
    rng = np.random.default_rng(3)

    def pad(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array, rng.standard_normal((24, *array.shape[1:])).astype(array.dtype)])

    page_table = np.zeros((wide.rows, wide.columns), np.int32)
    page_table[:2, :6] = case.page_table
    out = ragged_paged_attention(
        pad(case.q),
        pad(case.k),
        pad(case.v),
        jnp.array(case.pool),
        page_table=page_table,
        cu_q_lens=np.array([0, 30, 31, 31, 31, 31, 31], np.int32),
        kv_lens=np.array([50, 8, 0, 0, 0, 0], np.int32),
        **geometry.options(),
    )[0]
    np.testing.assert_allclose(out[:31], plain[:31], atol=2e-6)  # another tile size may sum in another order
    assert not np.asarray(out[31:]).any()


def test_the_metadata_module_pulls_in_nothing_of_serving() -> None:
    check = "import sys, engine.attention.layer; print([m for m in sys.modules if m.startswith('engine.serving')])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
