"""The whole step of a Llama, compiled for TPUs: the pool in place, nothing of its size moved, what devices exchange."""

from pathlib import Path

import pytest
from aot_support import NEEDS_LIBTPU, VMEM_BYTES

from engine.bench.tpu.aot import compile_each
from engine.config import read_toml
from engine.layer_groups import LayerGroups
from engine.models.model_config import ModelConfig

pytestmark = NEEDS_LIBTPU

CONFIGS = Path(__file__).parents[2] / "configs"
STEP = "engine.bench.tpu.step:compile_step"


def case(topology, name="llama-3-8b", *, layers=2, tokens=32, tp=1, dp=1, cp=1):
    return {
        "topology": topology,
        "model": read_toml(CONFIGS / f"{name}.toml")["model"],
        "layers": layers,
        "pool_tokens": 1 << 17,
        "page_size": 128,
        "tokens": tokens,
        "rows": 32,
        "context": 4096,
        "tp": tp,
        "dp": dp,
        "cp": cp,
    }


def check(case, found):
    assert "failed" not in found, found["failed"]
    # Nothing but weights, pool and the step's few integers goes in; the pool and the rows come out in the same memory.
    # The rows are a page table and tokens, padded to whole tiles.
    integers = found["argument bytes"] - found["weight bytes"] - found["pool bytes"]
    assert 0 <= integers < 1 << 20, case
    groups = LayerGroups.of(ModelConfig.from_mapping(case["model"]).layer_windows[: case["layers"]])
    assert found["aliased arrays"] == found["donated arrays"] == groups.num_buffers + 2, case
    rows_bytes = found["alias bytes"] - found["pool bytes"]
    least = 4 * case["rows"] * (groups.num_groups * case["context"] // case["page_size"] + 1)
    assert least <= rows_bytes <= 8 * least, case
    assert found["moves"] == [], case
    # What is temporary is of the step's size; that is more than an eighth of a pool only where devices share its pages.
    hidden_bytes = 4 * case["tokens"] * case["model"]["hidden_size"]
    assert found["temporary bytes"] < max(found["pool bytes"] / 8, 4 * hidden_bytes), case
    # Attention writes the new tokens too; where slots are dealt out, a kernel of its own does.
    assert len(found["VMEM bytes"]) == case["layers"] * (1 + (case["cp"] > 1))
    assert max(found["VMEM bytes"]) < VMEM_BYTES["v7x" if "7x" in case["topology"] else "v6e"]
    collectives, expected = found["collectives"], expected_collectives(case)
    assert {name: collectives.get(name) for name in expected} == expected, collectives
    # At last the tokens of all replicas, for the host.
    left = {name: count for name, count in collectives.items() if name not in expected}
    assert sum(left.values()) == (case["dp"] > 1), left
    assert all(name.endswith(f" s32[{case['dp'] * case['rows']}]") for name in left), left


def expected_collectives(case):
    """What the devices of a replica exchange in a step: opcode and largest array, and how often."""
    layers, rows, tokens, tp = case["layers"], case["rows"], case["tokens"], case["tp"]
    expected = {}
    if case["cp"] > 1:
        # Attention's parts, merged by their log-sum-exp: its maximum, then the weighted sums with those of the weights.
        rows_of_heads = f"{tokens},{case['model']['num_attention_heads'] // tp}"
        expected[f"all-reduce f32[{rows_of_heads}]"] = layers
        expected[f"all-reduce f32[{rows_of_heads},{case['model']['head_dim']}]"] = layers
    if tp > 1:
        # The embedding's, and after attention and MLP of each layer; then each device's best token and its logit. The
        # logits stay where they are.
        expected[f"all-reduce bf16[{tokens},{case['model']['hidden_size']}]"] = 1 + 2 * layers
        expected[f"all-gather f32[{tp},1,{rows}]"] = expected[f"all-gather s32[{tp},1,{rows}]"] = 1
    return expected


def check_all(cases):
    results = list(compile_each(STEP, cases))
    assert len(results) == len(cases)
    for case, found in zip(cases, results, strict=True):
        check(case, found)


def test_a_step_moves_nothing_of_the_pool():
    check_all([case("v6e:2x2", layers=1), case("v5e:2x4", tp=8), case("v6e:4x4", "llama-3-70b", tp=8, dp=2)])


def test_a_step_whose_tokens_are_dealt_out_exchanges_only_what_merges_them():
    check_all([case("v6e:2x2", layers=1, cp=2), case("v6e:2x2", tp=2, cp=2)])


@pytest.mark.slow
def test_larger_steps_move_nothing_of_the_pool():
    check_all(
        [
            case("tpu7x:2x2x1", tokens=1024),
            case("v6e:2x2", "mistral-7b", tokens=1024),
            case("v6e:2x2", "qwen2.5-7b"),
            case("v6e:2x2", "gemma-3-27b", layers=12, tp=4),
            case("v5e:16x16", tp=8, dp=32),
        ]
    )


@pytest.mark.slow
def test_larger_steps_whose_tokens_are_dealt_out():
    check_all(
        [
            case("v5e:2x4", tp=2, cp=4),
            case("tpu7x:2x2x1", tokens=1024, tp=2, cp=4),
            case("v6e:4x4", "llama-3-70b", tp=4, dp=2, cp=2),
        ]
    )
