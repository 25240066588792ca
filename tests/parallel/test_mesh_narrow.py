"""int8 and int4 pools over a mesh: the bytes of one device, in place, and its attention."""

from devices import run_on_devices

CASES = [[{"tp": 2, "dp": 2, "cp": 2}, "int4"], [{"cp": 4}, "int8"], [{"tp": 4}, "int8"], [{}, "int4"]]


def test_codes_and_scales_split_as_heads_and_tokens_do():
    results = run_on_devices("narrow_program.py", CASES)
    assert [result["case"] for result in results] == CASES
    for result in results:
        assert result["wrong"] == [], result
        assert result["error"] < 1e-5, result  # float32 sums in another order; outputs are of order 1
        assert not result.get("moved", False), result
        assert result.get("gathers", 0) == 0, result
        assert result.get("bytes", 0) == 0, result
