"""Several processes with a host tier: pages come back from it, and from the disk into others, as on one device."""

import numpy as np
import pytest
from processes import run_processes

# One program for all steps. A prompt with its answer is six pages of eight tokens: two of them fill a pool.
OPTIONS = {"page_size": 8, "max_running_requests": 4, "chunked_prefill_size": 4, "context_length": 64}
OPTIONS |= {"max_total_tokens": 96, "host_tier_bytes": 1 << 20}


def reports_of(ended):
    for process in ended:
        assert process.code == 0, process.errors[-4000:]
    reports = [process.printed[-1] for process in ended]
    assert [report.pop("index") for report in reports] == list(range(len(ended)))
    assert all(report == reports[0] for report in reports), reports
    assert reports[0]["compiles"] == 0
    return reports[0]


@pytest.fixture(
    scope="module", params=[{"tp": 2}, *(pytest.param(a, marks=pytest.mark.slow) for a in ({"cp": 2}, {"dp": 2}))]
)
def saved(request, tmp_path_factory):
    """Prompts, options of two processes that have served and saved them, what they said, and answers of one device."""
    axes, rng = request.param, np.random.default_rng()
    prompts = [rng.integers(0, 256, size=40).tolist() for _ in range(3 * axes.get("dp", 1))]
    replicas = {name: OPTIONS[name] * axes.get("dp", 1) for name in ("max_total_tokens", "max_running_requests")}
    options = OPTIONS | axes | replicas | {"prefix_cache_dir": str(tmp_path_factory.mktemp("prefixes"))}
    alone = reports_of(run_processes(1, "keep", OPTIONS, prompts))
    return prompts, options, reports_of(run_processes(2, "keep", options, prompts)), alone["answers"]


def test_pages_come_back_from_the_host_in_every_process(saved):
    prompts, _, report, answers = saved
    assert report["answers"] == answers
    assert report["cached"] == [0] * len(prompts) + [32]
    assert report["loaded"] > 0
    assert 0 < report["saved"] == report["there"]


def test_pages_that_processes_saved_come_back_in_others(saved):
    prompts, options, before, answers = saved
    report = reports_of(run_processes(2, "keep", options, prompts))
    assert report["answers"] == answers
    assert report["cached"] == [32] * len(prompts) + [32]
    assert report["loaded"] >= before["loaded"] + 4


@pytest.mark.slow
def test_a_process_that_reads_other_saved_prefixes_than_the_first_is_refused(saved, tmp_path):
    _, options, _, _ = saved
    ended = run_processes(2, "open_directories", options, [options["prefix_cache_dir"], str(tmp_path)])
    assert ended[1].code == 2, ended[1].errors[-3000:]
    message = ended[1].printed[-1]["refused"]
    assert f"process 1 does not have what process 0 has: saved prefixes from prefix_cache_dir={tmp_path};" in message


@pytest.mark.slow
def test_a_copy_that_is_late_on_one_of_two_processes_changes_no_answer():
    prompts = [np.random.default_rng().integers(0, 256, size=40).tolist() for _ in range(3)]
    options = OPTIONS | {"tp": 2}
    plain = reports_of(run_processes(2, "keep", options, prompts))
    late = reports_of(run_processes(2, "keep_with_late_copies", options, prompts))
    assert late == plain
    assert late["loaded"] > 0
