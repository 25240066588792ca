"""Attention over a mesh against the float64 oracle: NaN in dead slots, written in place, nothing gathered."""

import pytest
from devices import run_on_devices

FEATURES = {"window": 32, "soft_cap": 20.0, "sinks": True}
DEFAULT = [
    [{"tp": 2}, {}, "auto"],
    [{"cp": 2}, {"window": 32, "soft_cap": 20.0, "sinks": True}, "auto"],
    [{"cp": 4}, {"cache_dtype": "bfloat16", "scales": True}, "xla"],
    [{"tp": 2, "dp": 2, "cp": 2}, {"sinks": True}, "auto"],
]
SLOW = [
    [axes, options, impl]
    for axes in ({"tp": 2}, {"dp": 4}, {"cp": 2}, {"cp": 8}, {"tp": 2, "cp": 4}, {"dp": 2, "cp": 2, "tp": 2})
    for options in ({}, FEATURES, {"dtype": "bfloat16", "page_size": 8, "columns": 12}, {"q_heads": 2})
    for impl in ("reference", "xla", "cpu")
]


def check(cases):
    results = run_on_devices("attention_program.py", cases)
    assert [result["case"] for result in results] == cases
    for result in results:
        # One rounding to the output's type for each device that holds a part; outputs are of order 1.
        sixteen = "bfloat16" in (result["case"][1].get("dtype"), result["case"][1].get("cache_dtype"))
        assert result["error"] < (4e-2 if sixteen else 1e-5), result
        assert result["padding"] == 0, result
        assert result["pool"], result
        assert not result["moved"], result
        assert result["aliased"], result
        assert result["gathers"] == 0, result


def test_heads_tokens_and_sequences_split_over_a_mesh():
    check(DEFAULT)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(6))
def test_every_split_with_every_option(part):
    check(SLOW[part::6])
