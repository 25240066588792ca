"""``python -m engine.bench gpu``: each of its sections, small, on the CPU; and what happens where a worker fails."""

import dataclasses
import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from engine.bench import __main__ as bench
from engine.bench.gpu_device import clock, correctness
from engine.bench.gpu_device.cases import all_cases, expected_attention, make_inputs, small_cases
from engine.bench.gpu_device.profile import kernel_times
from engine.bench.gpu_device.report import Report
from engine.bench.gpu_device.sections import SECTIONS, Section, section_named
from engine.bench.gpu_device.shapes import Shape
from engine.bench.gpu_device.supervisor import run_tasks
from engine.bench.gpu_device.tables import print_tables
from engine.bench.gpu_device.worker import run_section

TORCH = ("ceilings", "sdpa", "flex")


def small_results(section):
    events = []
    tasks = list(enumerate(section.module.tasks("xla", small=True)))
    run_section(section, tasks, lambda **event: events.append(event))
    ended = {event["task"]: event for event in events if "phase" not in event}
    assert sorted(ended) == [number for number, _ in tasks]
    return [(task, ended[number]) for number, task in tasks]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_section_runs_small_on_a_cpu(section):
    if section.name in TORCH:
        pytest.importorskip("torch")
    for task, ended in small_results(section):
        assert "result" in ended, ended.get("trace")
        assert section.module.line(task, ended["result"])
        assert ended["result"].get("ok", True)
        assert ended["result"].get("in_place", True)
        assert ended["result"].get("error", 0) < 2e-2


def test_full_sizes_are_tasks_that_json_can_carry():
    for section in SECTIONS:
        tasks = section.module.tasks("gpu", small=False)
        assert tasks
        for task in json.loads(json.dumps(tasks)):
            if "shape" in task:
                assert Shape.of(task["shape"]).values() == {**task["shape"], "rows": Shape.of(task["shape"]).rows}


def test_a_case_says_what_the_reference_says():
    """Two statements of attention that share no code: this oracle, and the backend that tests elsewhere hold."""
    for case in small_cases():
        task = {"case": case.values(), "impl": "reference", "seed": 5}
        assert correctness.prepare(task)()["ok"]


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_a_case_is_poisoned_where_nothing_may_look(case):
    if case.shape.kv_lens.max() > 4096:
        pytest.skip("large, and made as the others are")
    inputs = make_inputs(case, 0)
    live, cached = int(inputs.cu_q_lens[-1]), int(case.shape.kv_lens.sum() - case.shape.tokens)
    assert np.isnan(inputs.q[live:].astype(np.float32)).all()
    whole = ~np.isnan(inputs.pool.astype(np.float32)).any(axis=(1, 2))
    assert whole.sum() == cached
    assert not whole[: case.shape.page_size].any()
    assert len(set(inputs.written.tolist())) == live


def judged(change):
    case = dataclasses.replace(small_cases()[0], lse=True, padding=3)
    inputs = make_inputs(case, 1)
    expected = expected_attention(case, inputs)
    results = [expected.out.astype(inputs.q.dtype), inputs.expected_pool.copy(), expected.lse.astype(np.float32)]
    assert correctness.judge(case, inputs, expected, results)["ok"]
    change(case, inputs, results)
    return correctness.judge(case, inputs, expected, results)


def test_a_wrong_output_is_reported_with_its_row():
    def change(case, inputs, results):
        results[0][int(inputs.cu_q_lens[1]) + 2, 3] += 1e-3

    found = judged(change)
    assert not found["ok"]
    assert "out row 1 (9 new of 9): 1 of 36 (token, head) wrong, first (2, 3)" in found["where"]


@pytest.mark.parametrize("part", [0, 2])
def test_an_output_that_is_not_a_number_is_wrong(part):
    def change(case, inputs, results):
        results[part][0] = np.nan

    assert not judged(change)["ok"]


def test_padding_must_be_zero():
    assert (
        "padding tokens is not all 0" in judged(lambda case, inputs, results: results[0].__setitem__(-1, 1.0))["where"]
    )


def test_unwritten_slots_and_wrongly_written_slots_are_counted_separately():
    def change(case, inputs, results):
        results[1][inputs.written[0]] = np.nan
        results[1][0, 0, 0] = 7.0

    found = judged(change)
    assert found["pool_slots"] == 2
    assert "1 new and 1 other slots are wrong" in found["where"]


def test_a_shape_counts_its_bytes_and_visible_pairs():
    shape = Shape(((2, 3, 5), (1, 1, 7)), page_size=4, q_heads=8, kv_heads=2, head_dim=16)
    assert shape.kv_bytes == (5 + 5 + 7) * 2 * 2 * 16 * 2
    pairs = 2 * (3 + 4 + 5) + 7
    assert shape.flops == pairs * 8 * 16 * 4
    table = shape.page_table(pages=50)
    assert table.shape == (3, 2)
    assert len(set(table.ravel().tolist())) == 6
    assert table.min() > 0


def test_the_clock_sees_the_device_and_neither_start_nor_end(monkeypatch):
    now, queue = [0.0], []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def dispatch():
        now[0] += 0.0001
        queue.append(None)

    def wait():
        now[0] += 0.05 + 0.003 * len(queue)
        queue.clear()

    timed = clock.time_queued(dispatch, wait, calls=4)
    assert timed["us"] == pytest.approx(3100 / 4)
    assert timed["host_us"] == pytest.approx(100 / 4)
    assert not timed["host_bound"]


def test_kernels_are_summed_by_name_over_the_streams_of_the_device():
    def of(name, nanoseconds):
        return SimpleNamespace(name=name, duration_ns=nanoseconds)

    stream = SimpleNamespace(name="Stream #1(Kernel)", events=[of("a", 1000), of("b", 5000), of("a", 3000)])
    other = SimpleNamespace(name="XLA Modules", events=[of("c", 9000)])
    planes = [
        SimpleNamespace(name="/device:GPU:0", lines=[stream, other]),
        SimpleNamespace(name="/host:CPU", lines=[stream]),
    ]
    assert kernel_times(planes, calls=2) == [
        {"name": "b", "us": 2.5, "times": 0.5},
        {"name": "a", "us": 2.0, "times": 1.0},
    ]


# A worker that does as its tasks say, all of them compiled before the first runs, as far as anybody can tell.
WORKER = """
import json, os, sys, time
tasks = json.load(sys.stdin)
def tell(number, **event):
    print(json.dumps({"task": number, **event}), flush=True)
if tasks[0][1] == "mute":
    time.sleep(60)
for number, task in tasks:
    tell(number, phase="compiling")
    if task == "abort" and "--one-by-one" in sys.argv:
        os._exit(5)
    if "--one-by-one" in sys.argv:
        tell(number, phase="compiled")
if any(task == "abort" for _, task in tasks):
    os._exit(5)
for number, task in tasks:
    tell(number, phase="running")
    if task == "hang":
        time.sleep(60)
    if task == "die":
        os._exit(9)
    tell(number, result={"did": task})
"""


def outcomes(tasks, *, patience=0.5, deadline=60.0, code=WORKER, compile_patience=30.0, workers=1):
    found = {}
    run_tasks(
        Section("any", patience=patience, workers=workers),
        tasks,
        lambda number, outcome: found.setdefault(number, []).append(outcome),
        time.monotonic() + deadline,
        worker=(sys.executable, "-c", code),
        compile_patience=compile_patience,
    )
    assert sorted(found) == list(range(len(tasks)))
    assert all(len(told) == 1 for told in found.values())
    return [found[number][0] for number in range(len(tasks))]


def test_a_task_that_hangs_or_kills_its_worker_costs_only_itself():
    told = outcomes(["well", "hang", "well", "die", "well"])
    assert [outcome.get("result", {}).get("did") for outcome in told] == ["well", None, "well", None, "well"]
    assert "silent" in told[1]["error"]
    assert "ended with code 9" in told[3]["error"]


def test_a_compiler_that_ends_its_process_is_found_by_compiling_one_by_one():
    told = outcomes(["well", "abort", "well"])
    assert [outcome.get("result", {}).get("did") for outcome in told] == ["well", None, "well"]
    assert "ended with code 5" in told[1]["error"]


def test_workers_share_the_tasks():
    told = outcomes(["well", "die", "well", "well", "well"], workers=2)
    assert [outcome.get("result", {}).get("did") for outcome in told] == ["well", None, "well", "well", "well"]


def test_a_worker_that_never_comes_to_a_task_is_not_started_again():
    told = outcomes(["mute", "well"], compile_patience=0.5)
    assert all("silent" in outcome["error"] for outcome in told)
    told = outcomes(["well"], code="raise SystemExit(4)")
    assert "ended with code 4" in told[0]["error"]


def test_what_has_no_time_left_is_skipped():
    told = outcomes(["well", "hang", "well"], patience=30.0, deadline=2.0)
    assert told[0]["result"] == {"did": "well"}
    assert told[1]["error"] == "out of time"
    assert told[2]["skipped"] == "out of time"


def test_a_device_that_fails_ends_its_worker(monkeypatch):
    from engine.bench.gpu_device import worker

    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    def prepare(task):
        if task["compiles"]:
            return lambda: 1 / 0
        raise ValueError("does not compile")

    events = []
    module = SimpleNamespace(prepare=prepare)
    section = SimpleNamespace(module=module, compiles_ahead=True)
    monkeypatch.setattr(worker.os, "_exit", leave)
    monkeypatch.setattr(worker, "_device_works", lambda: False)
    tasks = [(0, {"compiles": False}), (1, {"compiles": True}), (2, {"compiles": True})]
    with pytest.raises(Left):
        worker.run_section(section, tasks, lambda **event: events.append(event))
    failed = {event["task"]: event["error"] for event in events if "error" in event}
    assert failed == {0: "ValueError: does not compile", 1: "ZeroDivisionError: division by zero"}


def test_the_tables_set_each_contender_beside_ours(capsys):
    report = Report(None)
    shape = Shape(((32, 1, 2048),)).values()
    speed = {"gb_per_s": 1500.0, "tflop_per_s": 1.0, "host_bound": False, "finite": True}
    report.add("ceilings", {"what": "copy"}, {"result": {"gb_per_s": 3000.0}})
    report.add("decode", {"shape": shape, "impl": "gpu"}, {"result": {"us": 100.0, **speed}})
    report.add("decode", {"shape": shape, "impl": "xla"}, {"error": "out of memory"})
    report.add(
        "sdpa", {"shape": shape, "backend": "flash_attention", "folded": True}, {"result": {"us": 250.0, **speed}}
    )
    report.add("correctness", {"case": {"name": "decode"}}, {"error": "silent"})
    print_tables(report)
    out = capsys.readouterr().out
    assert "0 of 1 cases are right\n  decode: silent" in out
    assert "copy 3,000 GB/s" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("32 x 1 of 2048")]
    assert rows[0][5:] == ["ours", "(gpu)", "page", "16", "100.0", "1,500", "50.0%", "1.00"]
    assert rows[1][5:] == ["torch", "flash", "folded", "250.0", "1,500", "50.0%", "2.50"]


def run_bench(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_the_command_runs_its_workers_and_writes_what_it_found(capsys, monkeypatch, tmp_path):
    file = tmp_path / "gpu.json"
    options = ("--small", "--impl", "xla", "--only", "correctness,layers", "--out", str(file))
    code, out, _ = run_bench(capsys, monkeypatch, "gpu", *options)
    assert code == 0
    assert "correctness: 2 of 2 cases are right" in out
    sections = json.loads(file.read_text())["sections"]
    assert list(sections) == ["correctness", "layers"]
    assert all("result" in entry for entries in sections.values() for entry in entries)
    assert section_named("layers").compiles_ahead


def test_the_command_refuses_what_is_no_section(capsys, monkeypatch):
    code, _, err = run_bench(capsys, monkeypatch, "gpu", "--only", "correctness,speed")
    assert code == 2
    assert "--only names speed; sections are versions," in err
