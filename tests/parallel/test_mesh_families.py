"""Every family over a mesh of virtual devices answers as on one, with its weights shared out."""

import pytest
from devices import run_on_devices

FAMILIES = ["gpt_oss", "gemma3_text", "gemma2", "qwen3"]


def check(families, tp):
    results = run_on_devices("families_program.py", families, tp, devices=tp)
    assert [result["model_type"] for result in results] == families
    for result in results:
        assert result["unlike"] == 0, result
        assert result["tokens"] == 8
        assert result["apart"] < 1e-5, result  # sums in float32, in another order
        assert len(set(result["weights"])) == 1, result
        # Norms and the router are whole everywhere, and so are repeated KV heads.
        assert result["whole"] / tp <= result["weights"][0] < result["whole"] * (1 / tp + 0.15), result


@pytest.mark.slow
def test_experts_sinks_and_norms_of_heads_are_shared_out():
    check(["gpt_oss", "gemma3_text"], 2)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
def test_every_family_is_shared_out(tp):
    check(FAMILIES, tp)
