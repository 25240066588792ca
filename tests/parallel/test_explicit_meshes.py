"""Meshes as jax makes them by default, whose axes are Explicit: everything below the engine works on them."""

import pytest
from devices import run_on_devices


@pytest.mark.slow
def test_pool_layout_scatter_and_attention_run_on_auto_and_on_explicit_meshes():
    results = run_on_devices("explicit_program.py", devices=4)
    cases = [[kind, is_set] for kind in ("Auto", "Explicit") for is_set in (False, True)]
    assert [result["case"] for result in results] == cases
    for result in results:
        assert (result["layout"], result["pool"], result["calls"]) == (True, True, True), result
        # Float32 sums of up to 96 terms of order 1, against float64.
        assert max(result["errors"].values()) < 1e-5, result
        if result["case"][0] == "Explicit":
            assert "is split as" in result["refusal"], result
