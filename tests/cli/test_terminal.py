"""What every command does at a terminal: its streams, its exit codes, its one line, and Ctrl-C at any moment."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import cli
from engine.bench import __main__ as bench
from engine.bench import attention, pods, scatter
from engine.cli import main
from engine.errors import BackendUnsupported
from engine.serving.device.runner import ModelRunner
from engine.serving.llm import LLM
from engine.serving.request import RequestOutput
from engine.serving.stepper import Stepper
from engine.terminal import run_command

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
SMALL = ["--max-running-requests", "1", "--chunked-prefill-size", "1"]


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def start(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT} | options
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, **pipes)


def ended(process, timeout=60):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def test_plan_works_for_every_configuration_that_ships_in_one_call(capsys):
    code, out, err = run(capsys, "plan", *CONFIGS)
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == [str(path) for path in CONFIGS]
    assert len(CONFIGS) >= 5


def test_plan_works_for_a_checkpoint_folder(capsys):
    folder = ROOT / "engine" / "models" / "default"
    code, out, _ = run(capsys, "plan", folder, folder / "config.json")
    assert code == 0
    assert [line.split(":", 1)[1] for line in out.splitlines()] == [out.splitlines()[0].split(":", 1)[1]] * 2
    assert "4.00 KiB per token (bfloat16)" in out


def test_plan_names_the_file_that_is_wrong(capsys, tmp_path):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[model]\nvocab_size = 5\n")
    code, out, err = run(capsys, "plan", CONFIGS[0], wrong)
    assert code == 2
    assert out.startswith(str(CONFIGS[0]))
    assert err.startswith(f"ConfigError: {wrong}: model config lacks")


def test_markup_is_printed_as_it_is(capsys, tmp_path, monkeypatch):
    path = tmp_path / "[red]:smile:[bold].toml"
    path.write_text(CONFIGS[0].read_text())
    assert run(capsys, "plan", path)[1].startswith(f"{path}: ")
    text = "[red]no[/red] :smile: [/] \x1b[1m"
    monkeypatch.setattr(LLM, "generate", lambda *_, **__: [RequestOutput([1], [2], text, "stop")])
    code, out, err = run(capsys, "generate", *SMALL, "--prompt", text)
    assert (code, out) == (0, f"{text}\n")
    assert "[0] 1 prompt tokens, ended by stop:" in err
    code, _, err = run(capsys, "generate", "--model", tmp_path / "[red]:key:")
    assert code == 2
    assert "[red]:key:" in err


def test_a_failed_request_prints_the_reason_and_gives_exit_code_1(capsys, monkeypatch):
    answers = [
        RequestOutput([1], [2], "right", "stop"),
        RequestOutput([1], [], "", "error", error="[x] a page is lost"),
    ]
    monkeypatch.setattr(LLM, "generate", lambda *_, **__: answers)
    code, out, err = run(capsys, "generate", *SMALL)
    assert (code, out) == (1, "right\n\n")
    assert "[1] [x] a page is lost" in err


def test_nothing_is_counted_before_there_is_a_count(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal: every state of the bar is written
    monkeypatch.setattr(LLM, "generate", lambda *_, **__: [])
    code, _, err = run(capsys, "generate", *SMALL)
    assert code == 0
    assert "loading the model" in err
    assert "8/8" in err
    assert "/?" not in err
    assert "0/" not in err.replace("0/8", "")


def config_with(tmp_path, model):
    path = tmp_path / "engine.toml"
    path.write_text(f"[model]\n{model}\n[engine]\nmax_running_requests = 1\nchunked_prefill_size = 1\n")
    return path


def test_a_model_table_that_would_be_ignored_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(ModelRunner, "compile_all", lambda *_: pytest.fail("compiled"))
    code, out, err = run(capsys, "generate", "--config", ROOT / "configs" / "llama-3-8b.toml")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "does not describe the model to be loaded, the small Llama that ships (no --model): vocab_size" in err


def test_a_model_table_of_the_model_that_answers_is_fine(capsys, monkeypatch):
    monkeypatch.setattr(LLM, "generate", lambda *_, **__: [])
    code, _, _ = run(capsys, "generate", "--config", ROOT / "configs" / "default.toml", *SMALL)
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--metrics-port", "65536"], "--metrics-port 65536 must be from 0"),
        (["generate", "--metrics-port", "-1"], "--metrics-port -1 must be from 0"),
        (["generate", "--config", "/"], "cannot read the configuration /: Is a directory"),
        (["generate", "--config", "a\0b"], "is not valid TOML"),
        (["generate", "--model", ""], "config.json does not exist"),
        (["generate", "--max-total-tokens", str(2**31)], "max_total_tokens=2147483648 must be a whole number"),
        (["plan", "/"], "/config.json does not exist"),
        (["train", "--steps", "0"], "cannot train for 0 steps"),
        (["train", "--seed", "-1"], "the seed -1; give a number from 0"),
        (["train", "--out", "/proc/nothing"], "cannot write to --out /proc/nothing"),
        (["launch", "--processes", "1"], "launch needs a command"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(ModelRunner, "compile_all", lambda *_: pytest.fail("compiled"))
    if arguments[0] == "train" and "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_what_is_not_installed_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "optax", None)
    for arguments, message in (
        (("generate", "--metrics-port", 0), "--metrics-port needs prometheus-client"),
        (("train", "--out", tmp_path), "training needs optax"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1


def run_bench(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as end:
        bench.main()
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured"))
    code, out, err = run_bench(capsys, monkeypatch, "attention", "--plot")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--plot needs matplotlib" in err


def test_pods_outside_a_source_tree_or_without_libtpu_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(pods, "compile_each", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr(pods, "libtpu_version", lambda: "1")
    code, _, err = run_bench(capsys, monkeypatch, "pods", "--write", str(tmp_path / "absent" / "page.md"))
    assert (code, err.count("\n")) == (2, 1)
    assert "is not a directory" in err
    monkeypatch.setattr(pods, "CONFIGS", tmp_path / "configs")
    code, _, err = run_bench(capsys, monkeypatch, "pods")
    assert (code, err.count("\n")) == (2, 1)
    assert "only a source tree has" in err

    def absent():
        raise BackendUnsupported("libtpu is not installed")

    monkeypatch.setattr(pods, "libtpu_version", absent)
    code, _, err = run_bench(capsys, monkeypatch, "pods")
    assert (code, err) == (2, "BackendUnsupported: libtpu is not installed\n")


@pytest.mark.parametrize(
    "arguments", [("attention", "--rounds", "0"), ("step", "--batch", "-1"), ("serve", "--rate", "0")]
)
def test_a_measure_of_nothing_is_refused(capsys, monkeypatch, arguments):
    code, out, err = run_bench(capsys, monkeypatch, *arguments)
    assert (code, out) == (2, "")
    assert "must be a" in err.splitlines()[-1]


def test_what_a_window_costs_is_told_beside_one_window_and_full_attention(capsys, monkeypatch):
    sizes = ("--window", "16", "--context", "64", "--batch", "1", "--chunk", "8", "--rounds", "1")
    code, out, _ = run_bench(capsys, monkeypatch, "window", *sizes, "--impl", "xla")
    assert code == 0
    for row in ("xla, decode 1 x 1", "xla, prefill 1 x 8", "page lookup, 64 rows"):
        (line,) = (line for line in out.splitlines() if line.startswith(row))
        numbers = [float(cell) for cell in line.removeprefix(row).split()]
        assert len(numbers) == 5
        assert min(numbers) >= 0


def test_a_benchmark_that_is_interrupted_says_so(capsys, monkeypatch):
    monkeypatch.setattr(bench, "leave", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    monkeypatch.setattr(scatter, "run", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run_bench(capsys, monkeypatch, "scatter") == (130, "", "interrupted\n")


@pytest.mark.parametrize("platform", ["cuda", "nothing"])
def test_a_platform_that_is_not_there_is_one_line(platform):
    for command in (("-m", "engine", "generate"), ("-m", "engine.bench", "scatter")):
        code, out, err = ended(start(*command, env={"JAX_PLATFORMS": platform}))
        assert (code, out) == (2, "")
        assert err.startswith(f"ConfigError: jax has no device to run on: JAX_PLATFORMS='{platform}'")
        assert err.count("\n") == 1


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert "fused-kv-engine " in capsys.readouterr().out


def test_a_reader_that_has_gone_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    code, _, err = ended(start("-m", "engine", "plan", CONFIGS[0], stdout=writer))
    os.close(writer)
    assert (code, err) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_an_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        code, _, err = ended(start("-m", "engine", "plan", CONFIGS[0], stdout=full))
    assert (code, err) == (1, "OSError: [Errno 28] No space left on device\n")


def test_what_the_terminal_cannot_write_is_escaped(tmp_path):
    path = tmp_path / "größe.toml"
    path.write_text(CONFIGS[0].read_text())
    code, out, err = ended(start("-m", "engine", "plan", path, env={"PYTHONIOENCODING": "ascii"}))
    assert (code, err) == (0, "")
    assert "gr\\xf6\\xdfe.toml: " in out


def test_ctrl_c_prints_the_answers_so_far(capsys, monkeypatch):
    advance, steps = Stepper.advance, []

    def interrupted(self, *arguments, **options):
        steps.append(advance(self, *arguments, **options))
        if len(steps) == 30:
            signal.raise_signal(signal.SIGINT)
        return steps[-1]

    monkeypatch.setattr(Stepper, "advance", interrupted)
    prompts = ("--prompt", "A", "--prompt", "The", "--prompt", "Alice")
    code, out, err = run(capsys, "generate", *SMALL, *prompts, "--max-new-tokens", 9, "--ignore-eos", "--check")
    assert code == 130
    assert err.splitlines()[-1] == "interrupted: these are the answers so far"
    assert [line.split("by ")[1] for line in err.splitlines() if "ended by" in line] == ["length:", "length:", "abort:"]
    monkeypatch.setattr(Stepper, "advance", advance)
    whole = run(capsys, "generate", *SMALL, *prompts, "--max-new-tokens", 9, "--ignore-eos")[1]
    assert whole.startswith(out.rstrip("\n"))
    assert len(out.strip()) > 9


def test_ctrl_c_before_there_are_answers_is_one_line(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelRunner, "compile_all", interrupt)
    assert run(capsys, "generate") == (130, "", "interrupted\n")


def test_ctrl_c_that_a_finalizer_swallows_comes_again(capsys):
    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def command():
        Finalized()
        time.sleep(30)

    begin = time.monotonic()
    assert run_command(command) == 130
    assert time.monotonic() - begin < 20
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("module", "wait"), [("numpy", 0.0), ("jax._src.core", 0.0), ("engine.serving.llm", 1.5)])
def test_ctrl_c_while_it_loads_or_compiles_is_one_line(module, wait):
    process = start("-X", "importtime", "-m", "engine", "generate", "--ignore-eos")
    for line in process.stderr:
        if line.rstrip().endswith(f" {module}"):
            break
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert (code, out) == (130, "")
    assert [line for line in err.splitlines() if not line.startswith("import time:")] == ["interrupted"]


CHILD = r"""
import os, signal, time

def speak(*_):
    os.write(1, b"answers so far\n")
    os._exit(130)

signal.signal(signal.SIGINT, speak)
os.write(1, b"%d\n" % os.getpid())
time.sleep(60)
"""
LAUNCHER = f"""
import subprocess, sys
from engine.distributed import launch
from engine.cli import main
from engine.terminal import leave

launch._start = lambda words, index, count, address, devices, group: subprocess.Popen(
    [sys.executable, "-c", {CHILD!r}], process_group=group
)
leave(main(["launch", "--processes", "2", "--", "generate"]))
"""


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [(signal.SIGINT, 130, ["answers so far"]), (signal.SIGTERM, 143, []), (signal.SIGHUP, 129, [])],
)
def test_a_launcher_that_is_ended_leaves_no_process_behind(sent, code, said):
    process = start("-c", LAUNCHER)
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(sent)
    returned, out, err = ended(process)
    assert (returned, out.splitlines(), err) == (code, said, "")
    assert not any(map(is_alive, pids))
