"""The GPU's programs, compiled for H100 and H200 with no GPU: in place, no spills, the loops as they are meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest
from aot_gpu import NEEDS_COMPILER, PROGRAMS, check_footprint, shape

from engine.bench.gpu import baseline
from engine.bench.gpu.aot import compile_each
from engine.bench.static_options import read_baseline
from engine.config import read_toml

pytestmark = NEEDS_COMPILER

CONFIGS = Path(__file__).parents[2] / "configs"
BASELINE = read_baseline(Path(__file__).with_name("static_baseline.json"), jax.__version__)
KERNELS = {"scatter_rows", "decode_chunks", "prefill_tiles", "merge_chunks"}
FAST = {
    "h100 page 16": shape(),
    "h100 decode page 64": shape(decode=True, page_size=64),
    "h200 64 heads of 64": shape("h200", q_heads=64, head_dim=64, page_size=64),
    "everything, float16": shape(dtype="float16", extras=True, window=1000, page_size=128),
    "odd group, page 8": shape(q_heads=24, page_size=8),
}
SLOW = {
    "one shard of tp 8": shape(q_heads=4, kv_heads=1),
    "one head per KV head": shape("h200", q_heads=8, kv_heads=8, head_dim=64),
    "64 query heads of one KV head": shape(q_heads=64, kv_heads=1, decode=True),
    "page 24": shape(page_size=24, context=4080),
    "page 256, everything": shape("h200", page_size=256, extras=True, window=130, head_dim=64),
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return dict(zip(FAST, compile_each(f"{PROGRAMS}:compile_attention", list(FAST.values())), strict=True))


@pytest.mark.parametrize("name", FAST)
def test_a_call_takes_what_it_should(found: dict[str, dict[str, Any]], name: str) -> None:
    check_footprint(found[name])
    # A kernel that an earlier program had too is not compiled again.
    assert {"decode_chunks", "prefill_tiles"} <= set(found[name]["kernels"]) <= KERNELS
    assert found[name]["decode spills in the loop"] == found[name]["prefill spills in the loop"] == 0


def test_the_loops_are_as_they_are_meant(found: dict[str, dict[str, Any]]) -> None:
    plain = found["h100 page 16"]
    # 64 rows by 64 keys of 128 in steps of 16 elements, then 64 keys in steps of 16; four pages of 16 a step.
    assert plain["decode products per step"] == 8 + 4
    assert plain["decode instructions per KV token"] == plain["decode instructions per step"] / 64
    assert plain["decode copies per step"] == 4
    # 128 keys: again eight, and eight; eight pages.
    assert plain["prefill products per step"] == 8 + 8
    assert plain["prefill copies per step"] == 8
    assert found["h100 decode page 64"]["decode copies per step"] == 1


@pytest.mark.slow
def test_other_shapes_take_what_they_should() -> None:
    for name, result in zip(SLOW, compile_each(f"{PROGRAMS}:compile_attention", list(SLOW.values())), strict=True):
        # Of 64 query heads a KV head, each chunk's result is 32 KiB, and 132 blocks get up to eight of them.
        most = 40 << 20 if SLOW[name]["q_heads"] // SLOW[name]["kv_heads"] == 64 else None
        check_footprint(result, most_temporary=most)


def test_prefill_issues_no_more_than_the_yardstick(found: dict[str, dict[str, Any]]) -> None:
    sizes = {"target": "h100", "q_heads": 32, "kv_heads": 8, "head_dim": 128, "tokens": 4096}
    (theirs,) = compile_each(f"{PROGRAMS}:compile_yardstick", [sizes])
    assert "failed" not in theirs, theirs["failed"]
    assert found["h100 page 16"]["prefill instructions per step"] <= theirs["prefill instructions per step"]


def test_no_worse_than_the_baseline(found: dict[str, dict[str, Any]]) -> None:
    if not BASELINE:
        pytest.skip(
            f"jax {jax.__version__} has no baseline: code differs between its versions, so there is nothing to compare "
            "with; write one with python -m engine.bench gpu-static --write-baseline"
        )
    assert baseline.regressions(BASELINE["h100 page 16"], found["h100 page 16"]) == []


def test_a_scatter_is_in_place() -> None:
    sizes = {"target": "h100", "dtype": "bfloat16", "slots": 1 << 16}
    cases = [
        sizes | {"tokens": tokens, "kv_heads": heads, "head_dim": dim}
        for tokens, heads, dim in ((32, 8, 128), (4096, 8, 128), (7, 1, 64))
    ]
    for result in compile_each(f"{PROGRAMS}:compile_scatter", cases):
        check_footprint(result)
        assert list(result["kernels"]) == ["scatter_rows"]


def test_the_engines_whole_step_moves_nothing_of_the_pool() -> None:
    step = {
        "target": "h100",
        "model": read_toml(CONFIGS / "llama-3-8b.toml")["model"],
        "layers": 2,
        "pool_tokens": 1 << 17,
        "page_size": 16,
        "rows": 32,
        "context": 4096,
    }
    kernels: set[str] = set()
    for result in compile_each(f"{PROGRAMS}:compile_step", [step | {"tokens": 32}, step | {"tokens": 512, "tp": 2}]):
        assert "failed" not in result, result["failed"]
        assert result["moves"] == []
        assert result["aliased arrays"] == result["donated arrays"] == step["layers"] + 2
        assert result["alias bytes"] >= result["pool bytes"]
        assert result["temporary bytes"] < result["pool bytes"] / 8
        kernels |= set(result["kernels"])
    assert kernels == KERNELS


@pytest.mark.parametrize(
    ("control", "message"), [("compile_wide_steps", "prefill_tiles"), ("compile_undonated_scatter", "alias")]
)
def test_the_checks_refuse_what_is_wrong(control: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    (result,) = compile_each(f"gpu_controls:{control}", [{}])
    assert "failed" not in result, result["failed"]
    with pytest.raises(AssertionError, match=message):
        check_footprint(result)
