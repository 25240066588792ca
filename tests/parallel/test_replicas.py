"""Several replicas under hard traffic: the answers of one device, every page back, in place, in the planned memory."""

import pytest
from devices import run_on_devices

TIGHT = {"max_total_tokens": 160}  # of two replicas; the longest request takes 9 of the 10 pages of one
FEW = [
    [{"dp": 2, "tp": 2}, TIGHT],
    [{"dp": 2}, {**TIGHT, "overlap_steps": False, "host_tier_bytes": 1 << 18}],
]
MANY = [
    [{"dp": 2, "cp": 2}, {**TIGHT, "host_tier_bytes": 1 << 18}],
    [{"dp": 4}, {"max_total_tokens": 320}],
    [{"dp": 2, "cp": 2, "tp": 2}, {**TIGHT, "overlap_steps": False}],
    [{"dp": 4, "tp": 2}, {"max_total_tokens": 320, "disable_radix_cache": True}],
]


def check(cases, saves):
    *results, restored, moved = run_on_devices("replicas_program.py", cases, saves)
    assert [result["case"] for result in results] == cases
    for result in results:
        assert (result["unlike"], result["wrong"]) == (0, 0), result
        assert result["difference"] < 1e-4, result  # logits of order 1 in float32, summed in another order
        assert result["back"], result
        assert all(result["used"]), result
        assert not result["moved"], result
        assert not result["resharded"], result
        assert result["compiles"] == 0, result
        assert set(result["measured"]) == {result["planned"]}, result
        assert result["retractions"] > 0, result
        if not result["case"][1].get("disable_radix_cache"):
            assert result["hits"] > 0, result
        if result["case"][1].get("host_tier_bytes"):
            assert result["loaded"] > 0, result
    assert moved["answers"] == [[40], [4], [4], [20, 20, 20]]
    assert restored["files"] > 0
    for again in restored["restored"]:
        assert again["unlike"] == 0, restored
        assert again["loaded"] > 0, restored


@pytest.mark.slow
def test_two_replicas_answer_as_one_device():
    check(FEW, [{"dp": 2}])


@pytest.mark.slow
def test_more_replicas_with_heads_and_pages_split_answer_as_one_device():
    check(MANY, [{"dp": 4}])
