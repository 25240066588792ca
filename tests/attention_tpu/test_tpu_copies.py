"""Compiled for a TPU, neither attention nor the scatter copies the cache, whatever the heads, head_dim and dtype."""

from __future__ import annotations

from typing import Any

import pytest
from aot_support import NEEDS_LIBTPU

from engine.bench.tpu.aot import compile_each
from engine.bench.tpu_static import OURS

pytestmark = NEEDS_LIBTPU
SCATTER = "engine.bench.tpu.programs:compile_scatter"
TOKENS, BATCH, CONTEXT = 32, 32, 2048


def shape(kv_heads: int, q_heads: int, head_dim: int, dtype: str, page_size: int) -> dict[str, Any]:
    return {
        "kv_heads": kv_heads, "q_heads": q_heads, "head_dim": head_dim, "dtype": dtype, "page_size": page_size
    }  # fmt: skip


FEW = [shape(8, 16, 256, "bfloat16", 16), shape(10, 20, 128, "bfloat16", 16), shape(4, 8, 80, "float8_e4m3fn", 32)]
MANY = [
    *FEW,
    shape(1, 8, 256, "bfloat16", 128),
    shape(2, 8, 192, "bfloat16", 64),
    shape(8, 32, 64, "bfloat16", 16),
    shape(4, 8, 80, "bfloat16", 32),
    shape(4, 8, 256, "float32", 16),
    shape(8, 16, 256, "float8_e4m3fn", 32),
    shape(16, 32, 128, "float8_e4m3fn", 256),
    shape(1, 1, 128, "float32", 16),
]


def check_all(gen: str, shapes: list[dict[str, Any]]) -> None:
    calls = [one | {"gen": gen, "tokens": TOKENS, "batch": BATCH, "context": CONTEXT} for one in shapes]
    writes = [{name: one[name] for name in one if name != "q_heads"} for one in shapes]
    writes = [one | {"gen": gen, "tokens": TOKENS, "slots": BATCH * CONTEXT} for one in writes]
    for target, cases in ((OURS, calls), (SCATTER, writes)):
        results = list(compile_each(target, cases))
        assert len(results) == len(cases)
        for case, found in zip(cases, results, strict=True):
            assert "failed" not in found, f"{case}: {found['failed']}"
            assert found.get("kernel", True), case
            assert found["alias bytes"] == found["cache bytes"], case
            assert found["moves"] == [], case
            # Queries and results of 32 tokens laid out by head, beside 34 to 537 MB of cache.
            assert found["temporary bytes"] < 4 << 20, case


def test_no_copy_of_the_cache() -> None:
    check_all("v6e", FEW)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("gen", ["v5e", "v6e", "v7x"])
def test_no_copy_of_the_cache_in_any_shape(gen: str) -> None:
    check_all(gen, MANY)
