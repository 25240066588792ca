"""Penalties, biases, min-p and least lengths over replicas, and over devices that divide the vocabulary."""

from devices import run_on_devices

CASES = [{"dp": 2, "tp": 2}, {"tp": 2}]


def test_replicas_adjust_logits_as_one_device_does():
    first, *results = run_on_devices("adjusting_program.py", CASES, devices=4)
    assert first["adjusting"] >= 6
    assert [result["case"] for result in results] == CASES
    for result in results:
        assert result["unlike"] == 0, result
        assert result["compiles"] == 0, result
