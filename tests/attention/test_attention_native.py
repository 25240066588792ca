"""What is the native kernel's own: conversions, splits of the context, threads, odd shapes, and life without it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_impls import needs_native
from attention_oracle import DTYPES, Case, Geometry, make_case, relative_error, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention import ragged_paged_attention
from engine.errors import BackendUnsupported
from engine.native import library

pytestmark = needs_native

LONG = Geometry(q_heads=4, kv_heads=2, page_size=16, columns=100, tokens=100, rows=3)


def attend(case: Case, impl: str = "cpu") -> np.ndarray:
    out, _ = ragged_paged_attention(case.q, case.k, case.v, jnp.array(case.pool), impl=impl, **case.arguments())
    return np.asarray(out)


def one_token_each(dtype: str, head_dim: int, kv_heads: int, values: np.ndarray, pool_dtype: str) -> np.ndarray:
    """Sequences of two tokens, of which the first has all the weight and the value given: the output is that value."""
    rows = values.shape[0]
    q = jnp.full((rows, kv_heads, head_dim), 10, dtype)
    v = jnp.ones((rows, kv_heads, head_dim), dtype)
    pool = np.full((2 * (rows + 1), 2 * kv_heads, head_dim), 10, DTYPES[pool_dtype])
    for head in range(kv_heads):
        pool[2::2, 2 * head + 1] = values[:, head]
    out, _ = ragged_paged_attention(
        q,
        jnp.full_like(v, -10),
        v,
        jnp.array(pool),
        page_table=np.arange(1, rows + 1, dtype=np.int32)[:, None],
        cu_q_lens=np.arange(rows + 1, dtype=np.int32),
        kv_lens=np.full(rows, 2, np.int32),
        page_size=2,
        impl="cpu",
    )
    return np.asarray(out)


@pytest.mark.parametrize("head_dim", [128, 72])  # the decode path, and the path for heads that are not whole vectors
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_finite_value_of_16_bits_comes_through_unchanged(dtype: str, head_dim: int) -> None:
    patterns = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype]).astype(np.float32)
    # XLA's threads flush subnormals of float32, which bfloat16 shares.
    kept = np.isfinite(patterns) & ((dtype == "float16") | (np.abs(patterns) >= 2.0**-126))
    values = np.resize(patterns[kept], (2**16 // (8 * head_dim) + 1, 8, head_dim)).astype(DTYPES[dtype])
    np.testing.assert_array_equal(one_token_each(dtype, head_dim, 8, values, dtype), values)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_outputs_are_rounded_to_the_nearest_even(dtype: str) -> None:
    rng = np.random.default_rng()
    values = rng.standard_normal((64, 2, 64)).astype(np.float32) * 10.0 ** rng.integers(-9, 5, (64, 2, 64))
    values = values.astype(np.float32)
    values[0, 0, :4] = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11]  # ties of bfloat16 and of float16
    with np.errstate(over="ignore"):
        expected = values.astype(DTYPES[dtype])
    assert same_bits(one_token_each(dtype, 64, 2, values, "float32"), expected)


@given(
    st.lists(st.integers(0, 1500), min_size=3, max_size=3), st.sampled_from([1, 2, 30, 90]), st.integers(0, 2**32 - 1)
)
@settings(max_examples=8)
def test_a_context_that_is_split_sums_to_the_whole(prefixes: list[int], q_len: int, seed: int) -> None:
    case = make_case(LONG, [q_len, 1, 2], prefixes, seed)
    # Float32 keeps 24 bits; 1,500 weighted values of unit size lose a few of them.
    assert relative_error(attend(case), case.expected_out()) <= 1e-5


@pytest.mark.parametrize(
    "changes", [{"window": 700}, {"soft_cap": 3.0, "sinks": True}, {"q_heads": 2}, {"q_heads": 24}]
)
def test_a_split_context_with_options_and_other_groups(changes: dict[str, object]) -> None:
    case = make_case(replace(LONG, **changes), [5, 1, 1], [1400, 1500, 513], seed=61)
    assert relative_error(attend(case), case.expected_out()) <= 1e-5


def test_a_split_context_does_not_depend_on_the_batch() -> None:
    case = make_case(LONG, [20, 1, 60], [900, 1300, 700], seed=62)
    whole = attend(case)
    for row in range(3):
        kept = np.where(np.arange(3) == row, case.q_lens, 0)
        tokens = np.r_[case.cu_q_lens[row] : case.cu_q_lens[row + 1]]
        order = np.r_[tokens, np.setdiff1d(np.arange(LONG.tokens), tokens)]
        lone = replace(
            case,
            q=case.q[order],
            k=case.k[order],
            v=case.v[order],
            pool=np.asarray(case.expected_pool()),
            cu_q_lens=np.concatenate([[0], np.cumsum(kept)]).astype(np.int32),
        )
        assert same_bits(attend(lone)[: len(tokens)], whole[tokens])


ATTEND_AND_PRINT = """
import os, sys
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(sys.argv[1])]))
import hashlib
from test_attention_native import LONG, attend, make_case
case = make_case(LONG, [30, 1, 60], [900, 1300, 700], seed=63)
print(hashlib.sha256(attend(case).tobytes()).hexdigest())
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="the processors of a process can be chosen on Linux only"
)
def test_the_number_of_threads_changes_no_bit() -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    digests = set()
    for threads in (1, 64):
        run = subprocess.run(
            [sys.executable, "-c", ATTEND_AND_PRINT, str(threads)],
            env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout)
    assert len(digests) == 1


def test_auto_takes_the_native_kernel_here_and_none_elsewhere() -> None:
    case = make_case(Geometry(), [5, 1, 0, 20], [10, 33, 4, 0], seed=64)

    def step(pool: jax.Array) -> jax.Array:
        return ragged_paged_attention(case.q, case.k, case.v, pool, **case.arguments())[0]

    traced = jax.jit(step).trace(case.pool)
    assert library.ATTENTION in traced.lower().as_text()
    assert library.ATTENTION not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_without_the_library_auto_answers_and_cpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(replace(Geometry(), sm_scale=0.31), [5, 1, 0, 20], [10, 33, 4, 0], seed=65)
    monkeypatch.setattr(library, "available", lambda: False)
    jax.clear_caches()
    assert same_bits(attend(case, "auto"), attend(case, "xla"))
    with pytest.raises(BackendUnsupported, match="native library"):
        attend(case)
    jax.clear_caches()


def test_float8_of_another_kind_is_left_to_xla() -> None:
    case = make_case(Geometry(), [5, 1, 0, 20], [10, 33, 4, 0], seed=66)
    stored = jnp.array(case.pool).astype(jnp.float8_e5m2)
    with pytest.raises(BackendUnsupported, match="float8_e5m2"):
        ragged_paged_attention(case.q, case.k, case.v, stored, impl="cpu", **case.arguments())
    results = [
        ragged_paged_attention(case.q, case.k, case.v, stored, impl=impl, **case.arguments())[0]
        for impl in ("auto", "xla")
    ]
    assert same_bits(*results)


def test_lengths_that_cannot_be_checked_under_jit_do_not_reach_outside_memory() -> None:
    case = make_case(Geometry(), [5, 1, 0, 20], [10, 33, 4, 0], seed=67)

    @jax.jit
    def step(table: jax.Array, bounds: jax.Array, lens: jax.Array) -> jax.Array:
        arguments = {**case.arguments(), "page_table": table, "cu_q_lens": bounds, "kv_lens": lens}
        return ragged_paged_attention(case.q, case.k, case.v, jnp.array(case.pool), impl="cpu", **arguments)[0]

    rng = np.random.default_rng()
    for _ in range(20):
        wild = [rng.integers(-(2**31), 2**31 - 1, size, np.int32) for size in (case.page_table.shape, 5, 4)]
        assert step(*wild).shape == case.q.shape
