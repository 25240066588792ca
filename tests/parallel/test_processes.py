"""Several real processes as one engine: the answers of one device in every process, and no process outlives another."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import run_processes

VOCAB = 97  # of the program's model
OPTIONS = {"page_size": 8, "max_running_requests": 4, "chunked_prefill_size": 8, "context_length": 128}
SMALL = OPTIONS | {"max_running_requests": 2, "chunked_prefill_size": 2}  # one program for all steps
PARAMS = [
    {"max_new_tokens": 8},
    {"max_new_tokens": 12, "n": 2, "temperature": 0.8, "seed": 3},
    {"max_new_tokens": 5, "logprobs": 2, "timeout": 1000.0},
]


MORE = [
    (4, 1, {"tp": 4}),
    (2, 2, {"tp": 2, "cp": 2}),
    (2, 4, {"tp": 8}),
    (2, 2, {"dp": 2, "tp": 2}),
    (4, 1, {"dp": 2, "cp": 2}),
]


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng()
    return [rng.integers(0, VOCAB, size=n).tolist() for n in (13, 5, 30)]


@pytest.fixture(scope="module")
def one_device(prompts):
    (alone,) = run_processes(1, "compare", OPTIONS, prompts, PARAMS)
    assert alone.code == 0, alone.errors[-4000:]
    return alone.printed[-1]


def check_same(ended, count, one_device):
    for process in ended:
        assert process.code == 0, process.errors[-4000:]
    reports = [process.printed[-1] for process in ended]
    assert [report.pop("index") for report in reports] == list(range(count))
    assert all(report == reports[0] for report in reports), reports
    for name in ("answers", "stepped", "size", "refused"):
        assert reports[0][name] == one_device[name]
    # Stepped by hand, the first answer is as long as asked, and the second was aborted before it could end.
    first, second, third = reports[0]["stepped"]
    assert len(first) == len(third) == 10
    assert second is None
    assert "leaves no room" in reports[0]["refused"]
    assert reports[0]["compiles"] == 0
    return reports[0]


def test_two_processes_follow_the_first_and_answer_as_one_device(prompts, one_device):
    ended = run_processes(2, "compare", OPTIONS | {"tp": 2}, prompts, PARAMS)
    assert check_same(ended, 2, one_device)["parcels"] != 0


def test_two_processes_with_a_replica_each_answer_as_one_device(prompts, one_device):
    ended = run_processes(2, "compare", OPTIONS | {"dp": 2}, prompts, PARAMS)
    assert check_same(ended, 2, one_device)["parcels"] != 0


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices", "axes"), MORE)
def test_more_processes_and_devices(prompts, one_device, count, devices, axes):
    ended = run_processes(count, "compare", OPTIONS | axes, prompts, PARAMS, devices=devices)
    assert check_same(ended, count, one_device)["devices"] == count * devices


def test_every_process_sizes_the_pool_by_the_device_with_least_memory():
    reports = [{"bytes_limit": 10_000_000, "bytes_in_use": 100_000}, {"bytes_limit": 600_000, "bytes_in_use": 50_000}]
    options = OPTIONS | {"tp": 2, "max_running_requests": 64, "chunked_prefill_size": 64}
    ended = run_processes(2, "size", reports, options)
    assert [process.code for process in ended] == [0, 0], ended[0].errors[-3000:]
    sizes = {process.printed[-1]["size"] for process in ended}
    # 2 layers of 2 KV heads of 12 float32 on two devices: 192 bytes per token on each, and the null page beside.
    assert sizes == {(int(600_000 * 0.85) - 100_000) // (8 * 192) * 8 - 8}


def test_a_process_that_dies_stops_the_others_with_a_clear_error():
    ended = run_processes(2, "die", SMALL | {"tp": 2}, [[1, 2, 3]], "SIGKILL")
    assert ended[1].code == -signal.SIGKILL
    assert ended[0].code not in (0, -signal.SIGKILL), ended[0].errors[-3000:]
    (died,) = [line["dies"] for line in ended[1].printed if "dies" in line]
    assert ended[0].at - died < 30
    said = ended[0].errors + str(ended[0].printed)
    assert "Another process has died or hangs" in said or "another task died" in said, said[-3000:]


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up_after_its_heartbeats():
    ended = run_processes(2, "die", SMALL | {"tp": 2}, [[1, 2, 3]], "SIGSTOP", timeout=150)
    assert ended[0].code not in (0, -signal.SIGKILL), ended[0].errors[-3000:]
    (died,) = [line["dies"] for line in ended[1].printed if "dies" in line]
    assert ended[0].at - died < 60


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def test_launch_prints_one_answer_and_takes_all_processes_down_with_one():
    words = "generate --tp 2 --max-running-requests 1 --chunked-prefill-size 8 --ignore-eos --max-new-tokens 900"
    command = [sys.executable, "-m", "engine", "launch", "--processes", "2", "--", *words.split()]
    launcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    try:
        assert any("Gloo" in line for line in launcher.stderr)  # both are there, and compile
        children = children_of(launcher.pid)
        assert len(children) == 2
        os.kill(children[1], signal.SIGKILL)
        start = time.monotonic()
        _, errors = launcher.communicate(timeout=60)
        assert time.monotonic() - start < 30
    finally:
        launcher.kill()
    assert launcher.returncode == 3
    assert "process 1 of 2 was ended by SIGKILL" in errors, errors[-3000:]
    assert not [pid for pid in children if os.path.exists(f"/proc/{pid}")]
