"""Runs the GPU kernels in the interpreter and compares them with the oracle of the other backends' tests."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Case, Geometry, make_case, relative_error, same_bits

from engine.attention import AttentionMetadata
from engine.attention.options import AttentionOptions, HeadArrays
from engine.kv.gpu_target import OLDEST_JAX

__all__ = ["HOPPER_CASES", "NEEDS_MOSAIC", "Case", "Geometry", "check", "make_case", "same_bits"]

NEEDS_MOSAIC = [
    # A wait for what never comes hangs, out of reach of a signal's handler: the process is ended.
    pytest.mark.timeout(300, method="thread"),
    pytest.mark.skipif(
        jax.__version_info__ < OLDEST_JAX,
        reason=f"jax {jax.__version__} has no whole interpreter of Mosaic GPU kernels; jax 0.11.2 needs Python 3.12",
    ),
]
# A weight is rounded to the cache's 8 or 11 bits, and so is the output; averaging keeps values below about 3.
TOLERANCE = {"bfloat16": 8e-3, "float16": 1e-3}
LSE_TOLERANCE = 5e-6  # of float32 logits up to about 10

_GQA = {"dtype": "bfloat16", "head_dim": 64, "q_heads": 8, "kv_heads": 2, "page_size": 16, "columns": 20}


def geometry(**changes: Any) -> Geometry:
    return Geometry(**{**_GQA, **changes})


# Name: the geometry, new tokens per row, cached tokens per row.
HOPPER_CASES: dict[str, tuple[Geometry, list[int], list[int]]] = {
    "decode": (geometry(tokens=4), [1, 1, 1, 1], [0, 30, 130, 300]),
    "decode_at_the_edges_of_steps": (geometry(tokens=6, rows=6), [1] * 6, [62, 63, 64, 126, 127, 128]),
    "decode_d128_f16": (geometry(tokens=3, head_dim=128, dtype="float16", rows=3), [1, 1, 1], [5, 100, 250]),
    "decode_one_head_of_16_page8": (
        geometry(tokens=2, rows=2, q_heads=16, kv_heads=1, page_size=8, columns=90), [1, 1], [700, 1],
    ),
    "decode_page128": (geometry(tokens=3, rows=3, page_size=128, columns=4), [1, 1, 1], [500, 127, 128]),
    "decode_page24": (geometry(tokens=2, rows=2, page_size=24, columns=12), [1, 1], [200, 77]),
    "decode_window": (geometry(tokens=3, rows=3, window=70), [1, 1, 1], [10, 69, 300]),
    "prefill": (geometry(tokens=200), [150, 0, 20, 3], [0, 0, 100, 200]),
    "prefill_whole_tiles": (geometry(tokens=192, rows=2), [64, 128], [0, 64]),
    "prefill_d128_page64": (geometry(tokens=140, rows=2, head_dim=128, page_size=64, columns=5), [70, 65], [0, 190]),
    "prefill_odd_group": (geometry(tokens=180, rows=2, q_heads=3, kv_heads=1), [150, 30], [20, 100]),
    "prefill_window": (geometry(tokens=180, rows=2, window=100), [150, 30], [90, 250]),
    "prefill_window_of_one_page": (geometry(tokens=90, rows=2, window=7), [70, 20], [60, 0]),
    "short_rows": (geometry(tokens=35, rows=7), [2, 3, 4, 5, 6, 7, 8], [0, 15, 60, 63, 64, 100, 300]),
    "mixed": (geometry(tokens=120, rows=5), [1, 90, 0, 2, 1], [100, 130, 0, 290, 255]),
    "nothing_but_padding": (geometry(tokens=70, rows=2), [0, 0], [0, 0]),
    "sinks_and_soft_cap": (
        geometry(tokens=100, rows=4, sinks=True, soft_cap=5.0), [1, 80, 3, 1], [0, 60, 150, 310],
    ),
    "scales": (geometry(tokens=90, rows=3, scales=True), [1, 70, 1], [200, 33, 3]),
    "everything": (
        geometry(tokens=90, rows=3, head_dim=128, sinks=True, soft_cap=3.0, window=50, scales=True, page_size=8,
                 columns=40),
        [70, 1, 5], [100, 300, 40],
    ),
}  # fmt: skip


def check(
    case: Case, *, blocks: int = 2, logit_scale: float | None = None, table: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """Runs a case, all dead memory NaN, and compares output, log-sum-exp and every byte of the pool; also finds races.

    Args:
        case: the call.
        blocks: thread blocks of the decode kernel: few, so that each has several chunks.
        logit_scale: as a traced ``sm_scale``, of which the case's is made.
        table: the page table to pass in place of the case's.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from engine.attention.impl.gpu.gpu_step import ragged_paged_attention_gpu

    geo, case = case.geometry, case.poisoned()
    raising = "on_race" in {field.name for field in dataclasses.fields(plgpu.InterpretGPUParams)}
    params = plgpu.InterpretGPUParams(detect_races=True, **{"on_race": "raise"} if raising else {})
    described = (case.page_table if table is None else table, case.cu_q_lens, case.kv_lens)
    metadata = AttentionMetadata.build(*described, num_tokens=geo.tokens, page_size=geo.page_size)
    scale = geo.head_dim**-0.5 if geo.sm_scale is None else geo.sm_scale
    options = AttentionOptions(geo.page_size, scale / (logit_scale or 1), geo.window, geo.soft_cap, return_lse=True)
    arrays = (case.sinks, case.k_scale, case.v_scale, None if logit_scale is None else np.float32(logit_scale))
    heads = HeadArrays(*(None if array is None else jnp.asarray(array) for array in arrays))
    inputs = (jnp.asarray(array) for array in (case.q, case.k, case.v, case.pool))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):  # older interpreters only print, and forget what kernel raced
            got = ragged_paged_attention_gpu(*inputs, metadata, heads, options, blocks=blocks, interpret=params)
            out, pool, lse = (np.asarray(array) for array in got)
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()
    assert "RACE" not in printed.getvalue(), printed.getvalue()
    want, want_lse = case.expected()
    live = np.isfinite(want_lse)
    assert not out[~live].astype(np.float32).any(), "outputs of dead tokens are not zero"
    assert (lse[~live] == -np.inf).all(), "log-sum-exps of dead tokens are not minus infinity"
    if live.any():
        error = relative_error(out, want)
        assert error < TOLERANCE[geo.dtype], f"the outputs are not right: {error}"
        np.testing.assert_allclose(lse[live], want_lse[live], rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)
    assert same_bits(pool, case.expected_pool()), "the pool is not right"
    return out, pool, lse
