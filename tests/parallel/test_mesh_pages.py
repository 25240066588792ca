"""Pages of a pool over a mesh move as those of a pool on one device: heads, tokens and replicas in their places."""

import pytest
from devices import run_on_devices

DEFAULT = [[{"tp": 2, "dp": 2, "cp": 2}, "bfloat16"], [{"cp": 4}, "float32"]]
SLOW = [
    [axes, dtype] for axes in ({"tp": 4}, {"dp": 4}, {"cp": 8}, {"dp": 2, "cp": 4}) for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize("cases", [DEFAULT, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["few", "many"])
def test_pages_are_read_written_and_copied_in_place(cases):
    results = run_on_devices("pages_program.py", cases)
    assert [result["case"] for result in results] == cases
    for result in results:
        assert result["wrong"] == [], result
        assert not result["moved"], result
        assert result["bytes"] == 0, result
