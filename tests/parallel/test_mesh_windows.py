"""Layers of several groups over a mesh compute what dense layers do; nobody's pages hold NaN."""

from devices import run_on_devices


def test_groups_of_layers_over_a_mesh_compute_what_dense_layers_do():
    cases = [{"tp": 2}, {"cp": 2}, {"dp": 2, "cp": 2}]
    results = run_on_devices("windowed_program.py", cases)
    assert [result["axes"] for result in results] == cases
    for result in results:
        assert result["rows"] >= 12, result
        assert result["error"] < 2e-5, result
