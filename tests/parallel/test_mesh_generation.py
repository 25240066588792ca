"""Generation over a mesh of virtual devices: the same tokens as on one, in place, in the memory that was planned."""

import pytest
from devices import run_on_devices


def check(kv_heads, cases):
    results = run_on_devices("generation_program.py", kv_heads, cases)
    assert [result["case"] for result in results] == cases
    for result in results:
        assert result["answers"] == 5
        assert result["unlike"] == 0, result
        assert not result["moved"], result
        assert not result["resharded"], result
        assert result["compiles"] == 0, result
        assert set(result["measured"]) == {result["planned"]}, result
        assert len(set(result["weights"])) == 1, result
        tp = result["case"].get("tp", 1)
        # Norms are whole everywhere, and so are repeated KV heads.
        assert result["whole"] / tp <= result["weights"][0] < result["whole"] * (1 / tp + 0.15)


def test_heads_split_and_repeated_and_pages_shared():
    check(2, [{"tp": 2}, {"tp": 4}, {"cp": 2}])


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
def test_every_split_of_the_heads(kv_heads):
    check(kv_heads, [{"tp": 2}, {"tp": 4}, {"tp": 8}])


@pytest.mark.slow
def test_every_split_of_the_tokens():
    check(4, [{"cp": 2}, {"cp": 4}, {"cp": 8}, {"cp": 2, "tp": 4}])


@pytest.mark.slow
def test_two_models_of_different_tp_in_one_process():
    (result,) = run_on_devices("two_models_program.py", [{"tp": 2}, {"tp": 4}])
    assert result["unlike"] == [0, 0]
    assert result["compiles"] == 0
