"""The native kernel over float8, int8 and int4 caches, against float64 attention over what they stand for."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from attention_impls import needs_native
from attention_oracle import Case, Geometry, make_case, relative_error, same_bits

from engine.attention.impl.cpu import attend_cpu
from engine.attention.metadata import AttentionMetadata
from engine.attention.options import AttentionOptions, HeadArrays, scale_or_default
from engine.kv.narrow import NarrowKV

pytestmark = needs_native

NARROW = ("float8_e4m3fn", "int8", "int4")
WIDE = Geometry(q_heads=8, kv_heads=2, head_dim=128, page_size=16, columns=40, tokens=60, rows=4)
# Over 8-bit codes, queries of 16 bits and weights have two digits of base 256, of which the last unit is 2**-15 of the
# largest element of a row and 2**-16 of the largest weight of a block: some of them add up to 1e-4. Queries of float32
# are multiplied in float32, except with int4, where they come rotated and are always float32. A bfloat16 result is
# rounded to 2**-9.
TOLERANCES = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}
DIGITS = 2e-4


def tolerance(dtype: str, stored: str) -> float:
    return max(TOLERANCES[dtype], DIGITS if stored == "int4" else 0.0)


def narrow(pool: np.ndarray, stored: str, page_size: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """A pool's codes, its scales and, in float64, the values that they stand for."""
    if stored == "float8_e4m3fn":
        codes = pool.astype(ml_dtypes.float8_e4m3fn)
        return codes, None, codes.astype(np.float64)
    values = pool.astype(np.float32)
    scales = np.abs(values).max(-1) / np.float32(127 if stored == "int8" else 7)  # [S, R]
    if stored == "int4":  # scales may have any sign
        scales *= np.random.default_rng(0).choice([-1, 1], scales.shape).astype(np.float32)
    codes = np.rint(values / scales[..., None]).astype(np.int8)
    if stored == "int4":
        codes[codes == 7] -= 15  # every code occurs, -8 too
    by_page = scales.reshape(-1, page_size, scales.shape[1]).swapaxes(1, 2).reshape(-1, scales.shape[1] * page_size)
    exact = codes.astype(np.float64) * scales[..., None].astype(np.float64)
    if stored == "int4":
        low, high = np.split(codes.view(np.uint8), 2, axis=-1)
        codes = (low & 15) | (high << 4)
    return codes, by_page, exact


def narrow_case(
    geometry: Geometry, q_lens: list[int], prefixes: list[int], seed: int, stored: str
) -> tuple[Case, tuple]:
    """A case whose contexts are those of the narrow pool, and that pool, the new tokens in it."""
    case = make_case(geometry, q_lens, prefixes, seed)
    pool = case.expected_pool().astype(np.float32)
    # Rows of very different size, so that a scale of another token or row would show.
    pool *= 2.0 ** np.random.default_rng(seed).uniform(-2, 1, (*pool.shape[:2], 1)).astype(np.float32)
    codes, scales, exact = narrow(pool, stored, geometry.page_size)
    contexts = []
    for row, length in enumerate(case.kv_lens):
        slots = np.array([case.slot(row, position) for position in range(length)], int)
        contexts.append((exact[slots, 0::2], exact[slots, 1::2]))
    dead = ~case.owned_slots()
    codes[dead] = 0x7F  # float8: NaN
    if scales is not None:
        per_row = dead.reshape(-1, 1, geometry.page_size)
        scales = np.where(per_row, np.nan, scales.reshape(dead.size // geometry.page_size, -1, geometry.page_size))
        scales = scales.reshape(len(scales), -1).astype(np.float32)
    return replace(case, contexts=contexts), (codes, scales)


def attend(case: Case, stored: tuple, *, return_lse: bool = False):
    codes, scales = stored
    geometry = case.geometry
    metadata = AttentionMetadata.build(
        case.page_table, case.cu_q_lens, case.kv_lens, num_tokens=geometry.tokens, page_size=geometry.page_size
    )
    options = AttentionOptions(
        geometry.page_size,
        scale_or_default(geometry.sm_scale, geometry.head_dim),
        geometry.window,
        geometry.soft_cap,
        return_lse,
    )
    fused = jnp.asarray(codes) if scales is None else NarrowKV(jnp.asarray(codes), jnp.asarray(scales))
    q, k, v = (jnp.asarray(array) for array in (case.q, case.k, case.v))
    sinks = None if case.sinks is None else jnp.asarray(case.sinks)
    return attend_cpu(q, k, v, fused, metadata.to_device(), HeadArrays(sinks, None, None, None), options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("stored", NARROW)
def test_decode_and_extend_are_those_of_the_values(stored: str, dtype: str) -> None:
    case, pool = narrow_case(replace(WIDE, dtype=dtype), [1, 40, 1, 3], [600, 70, 31, 0], 71, stored)
    out, lse = case.expected()
    result = attend(case, pool, return_lse=True)
    assert relative_error(result.out, out) <= tolerance(dtype, stored)
    live = case.cu_q_lens[-1]
    assert np.abs(np.asarray(result.lse)[:live] - lse[:live]).max() <= tolerance("float32", stored) * 20 + DIGITS


@pytest.mark.parametrize("stored", NARROW)
@pytest.mark.parametrize(
    "changes",
    [
        {"window": 37},
        {"soft_cap": 3.0, "sinks": True},
        {"q_heads": 2},  # one query head for each KV head: a tile has empty rows
        {"q_heads": 12, "head_dim": 64},
        {"q_heads": 24, "head_dim": 256},  # too many for decoding
        {"head_dim": 72},  # no whole vectors
        {"page_size": 4, "columns": 160},  # pages smaller than a block
        {"page_size": 128, "columns": 5},
    ],
    ids=str,
)
def test_options_and_sizes(stored: str, changes: dict[str, object]) -> None:
    geometry = replace(WIDE, dtype="bfloat16", **changes)
    case, pool = narrow_case(geometry, [1, 33, 1, 1], [515, 70, 31, 0], 72, stored)
    assert relative_error(attend(case, pool).out, case.expected_out()) <= tolerance("bfloat16", stored)


@pytest.mark.parametrize("stored", NARROW)
def test_a_sequence_does_not_depend_on_the_batch(stored: str) -> None:
    case, pool = narrow_case(replace(WIDE, dtype="bfloat16"), [1, 20, 1, 1], [600, 500, 31, 17], 73, stored)
    whole = np.asarray(attend(case, pool).out)
    for row in range(4):
        kept = np.where(np.arange(4) == row, case.q_lens, 0)
        tokens = np.r_[case.cu_q_lens[row] : case.cu_q_lens[row + 1]]
        order = np.r_[tokens, np.setdiff1d(np.arange(WIDE.tokens), tokens)]
        bounds = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
        lone = replace(case, q=case.q[order], k=case.k[order], v=case.v[order], cu_q_lens=bounds)
        assert same_bits(np.asarray(attend(lone, pool).out)[: len(tokens)], whole[tokens])


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_a_scale_of_zero_is_a_row_of_zeros_and_a_nan_shows_in_its_own_sequence(stored: str) -> None:
    case, (codes, scales) = narrow_case(replace(WIDE, dtype="bfloat16"), [1, 1, 1, 1], [40, 50, 60, 70], 74, stored)
    page, offset = divmod(case.slot(0, 7), WIDE.page_size)
    by_row = scales.reshape(len(scales), -1, WIDE.page_size)  # a view
    by_row[page, :, offset] = 0
    for half in case.contexts[0]:
        half[7] = 0
    assert relative_error(attend(case, (codes, scales)).out, case.expected_out()) <= tolerance("bfloat16", stored)
    by_row[page, 1, offset] = np.nan  # V of the first head
    out = np.asarray(attend(case, (codes, scales)).out)
    assert np.isnan(out[0, :4]).all()
    assert np.isfinite(out[0, 4:]).all()
    assert np.isfinite(out[1:]).all()


def test_every_code_is_its_value() -> None:
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    values = values[np.isfinite(values.astype(np.float32))]
    for dtype, head_dim in [("bfloat16", 64), ("float32", 64), ("float32", 72)]:
        count = -(-len(values) // head_dim)
        geometry = Geometry(q_heads=1, kv_heads=1, head_dim=head_dim, tokens=count, rows=count, columns=1, dtype=dtype)
        case = make_case(geometry, [1] * count, [0] * count, seed=75)
        codes = np.zeros(case.pool.shape, ml_dtypes.float8_e4m3fn)
        rows = np.resize(values, (count, head_dim))
        for row in range(count):
            codes[case.slot(row, 0), 1] = rows[row]
        np.testing.assert_array_equal(np.asarray(attend(case, (codes, None)).out)[:, 0], rows.astype(np.float32))


ATTEND_AND_SAVE = """
import sys
import numpy as np
from test_attention_narrow_native import NARROW, WIDE, attend, narrow_case, replace
results = []
for stored in NARROW:
    for dtype in ("bfloat16", "float32"):
        case, pool = narrow_case(replace(WIDE, dtype=dtype), [1, 20, 1, 1], [600, 500, 31, 17], 76, stored)
        results.append(np.asarray(attend(case, pool).out))
np.save(sys.argv[1], np.stack(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["-mno-avx512vnni -mno-avx512bf16 -mno-avx512vbmi", "-mno-avx512f", "-mno-avx"])
def test_processors_without_the_newest_instructions_agree(lacking: str, tmp_path: Path) -> None:
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", ATTEND_AND_SAVE, str(tmp_path / "out.npy")],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
            "JAX_PLATFORMS": "cpu",
            "CXX": f"c++ {lacking}",
            "XDG_CACHE_HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    got = iter(np.load(tmp_path / "out.npy"))
    for stored in NARROW:
        for dtype in ("bfloat16", "float32"):
            case, pool = narrow_case(replace(WIDE, dtype=dtype), [1, 20, 1, 1], [600, 500, 31, 17], 76, stored)
            result = next(got)
            assert relative_error(result, case.expected_out()) <= tolerance(dtype, stored)
            assert relative_error(result, np.asarray(attend(case, pool).out)) <= 2 * tolerance(dtype, stored)


def test_nothing_is_copied() -> None:
    case, (codes, scales) = narrow_case(WIDE, [1, 1, 1, 1], [40, 50, 60, 70], 77, "int8")
    program = jax.jit(lambda codes, scales: attend(case, (codes, scales)).out).lower(codes, scales).compile()
    assert program.memory_analysis().temp_size_in_bytes < codes.nbytes
