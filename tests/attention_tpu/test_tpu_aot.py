"""Ahead-of-time compiles for real targets; they need libtpu, on Linux, and run in processes of their own."""

from pathlib import Path

import pytest
from aot_support import NEEDS_LIBTPU, VMEM_BYTES, shape

from engine.bench.tpu.aot import compile_each
from engine.bench.tpu_static import OURS
from engine.config import read_toml
from engine.models.model_config import ModelConfig

pytestmark = NEEDS_LIBTPU

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
GENERATIONS = ["v5e", "v6e", "v7x"]
LLAMA_8B, LLAMA_70B_BY_8 = {"q_heads": 32, "kv_heads": 8}, {"q_heads": 8, "kv_heads": 1}


def check(case, found):
    """In place, with little beside the cache, and within the chip."""
    assert "failed" not in found, f"{case}: {found['failed']}"
    assert found["alias bytes"] == found["cache bytes"], case
    assert found["moves"] == [], case
    # What is temporary is of the step's size, not the cache's: q, k, v, out in float32 and bfloat16, and their layouts
    # for the kernel; more than an eighth of these caches only where many query heads share few KV heads.
    queries_bytes = 4 * case["tokens"] * case["q_heads"] * case["head_dim"]
    assert found["temporary bytes"] < max(found["cache bytes"] / 8, 4 * queries_bytes), case
    # Some XLA of the step may hold VMEM across the call.
    assert 0 < found["VMEM bytes"] < VMEM_BYTES[case["gen"]] * 0.95, case


def check_all(cases):
    results = list(compile_each(OURS, cases))
    assert len(results) == len(cases)
    for case, found in zip(cases, results, strict=True):
        check(case, found)


def test_the_call_compiles_in_place_for_each_generation():
    check_all(
        [
            shape("v5e", "float8_e4m3fn", **LLAMA_70B_BY_8, decode=True),
            shape("v7x", "float32", **LLAMA_70B_BY_8, page_size=16),
            shape("v6e", **LLAMA_8B, decode=True, window=1024) | {"extras": True},
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("gen", GENERATIONS)
def test_every_dtype_compiles(gen, decode):
    check_all(
        [
            shape(gen, dtype, **heads, decode=decode)
            for dtype in ("bfloat16", "float32", "float8_e4m3fn")
            for heads in (LLAMA_8B, LLAMA_70B_BY_8)
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("gen", GENERATIONS)
def test_every_configured_geometry_compiles(gen, decode):
    cases = []
    for path in CONFIGS:
        tables = read_toml(path)
        if "model" in tables:
            model = ModelConfig.from_mapping(tables["model"])
            cases.append(
                shape(
                    gen,
                    q_heads=model.num_attention_heads,
                    kv_heads=model.num_key_value_heads,
                    head_dim=model.head_dim,
                    page_size=tables["engine"]["page_size"],
                    window=min(filter(None, model.layer_windows), default=None),
                    decode=decode,
                )
            )
    assert len(cases) >= 4
    check_all(cases)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_every_page_size_compiles(page_size):
    check_all([shape("v6e", page_size=page_size, decode=True)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn"])
@pytest.mark.parametrize("gen", GENERATIONS)
def test_sinks_soft_cap_and_log_sum_exp_compile_together(gen, dtype):
    """Whole blocks of queries, where the log-sum-exp takes 8 MiB of VMEM beside the rest."""
    check_all([shape(gen, dtype, **LLAMA_8B) | {"extras": True}])
