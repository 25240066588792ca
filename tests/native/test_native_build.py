"""Building, caching and loading of the native library, and life without it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.errors import BackendUnsupported
from engine.native import build, library

needs_compiler = pytest.mark.skipif(not library.available(), reason="no C++ compiler on this machine")

WRITE_AND_COMPARE = """
import jax, numpy as np, jax.numpy as jnp
from engine.kv.layout import merge_kv
from engine.kv.scatter import set_kv_buffer
rng = np.random.default_rng()
fused, k, v = (jnp.asarray(rng.standard_normal(shape)) for shape in ((16, 4, 8), (5, 2, 8), (5, 2, 8)))
wanted = np.array(fused)
wanted[[3, 9]] = np.asarray(merge_kv(k, v))[[3, 4]]
write = jax.jit(set_kv_buffer)
for _ in range(2):
    got = write(fused, jnp.array([3, -1, 16, 3, 9]), k, v)
np.testing.assert_array_equal(np.asarray(got), wanted)
print("custom_call" in write.lower(fused, jnp.array([3, -1, 16, 3, 9]), k, v).as_text())
"""


def run_python(*arguments, **environment):
    """Runs Python with these arguments and this environment on top of ours."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@needs_compiler
def test_a_second_build_takes_the_first_ones_file(empty_cache, monkeypatch):
    path = build.build_library()
    assert path.is_file()
    assert empty_cache in path.parents
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.build_library() == path


@needs_compiler
def test_simultaneous_builds_agree_and_leave_one_whole_file(empty_cache):
    with ThreadPoolExecutor(2) as threads:
        runs = list(threads.map(lambda _: run_python("-m", "engine.native"), range(2)))
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    assert runs[0].stdout == runs[1].stdout
    assert [path.name for path in (empty_cache / "fused-kv-engine").iterdir()] == [build.build_library().name]


@needs_compiler
def test_another_source_or_compiler_is_another_file(empty_cache, monkeypatch, tmp_path):
    first = build._fingerprint(("c++",))
    assert build._fingerprint(("clang++",)) != first
    source = tmp_path / "scatter.cc"
    source.write_text(build.SOURCES[0].read_text() + "// changed\n")
    monkeypatch.setattr(build, "SOURCES", (source,))
    assert build._fingerprint(("c++",)) != first


def test_a_missing_compiler_is_named(empty_cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(empty_cache))
    with pytest.raises(BackendUnsupported, match=r"no C\+\+ compiler"):
        build.build_library()


@pytest.mark.parametrize("compiler", ["no-such-compiler", f"{sys.executable} -c raise(SystemExit(3))"])
def test_a_failing_compiler_is_named_and_leaves_nothing(empty_cache, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(BackendUnsupported, match="set CXX"):
        build.build_library()
    assert not any(path.is_file() for path in empty_cache.rglob("*"))


def test_an_unwritable_cache_is_named(empty_cache, monkeypatch):
    blocked = empty_cache / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setenv("CXX", "c++")
    with pytest.raises(BackendUnsupported, match="XDG_CACHE_HOME"):
        build.build_library()


def test_a_corrupt_library_is_named(tmp_path, monkeypatch):
    corrupt = tmp_path / "libengine.so"
    corrupt.write_bytes(b"not a library")
    monkeypatch.setattr(library, "build_library", lambda: corrupt)
    with pytest.raises(BackendUnsupported, match="delete it"):
        library.register()


def test_without_a_compiler_the_write_is_the_same_and_one_warning_says_so(tmp_path):
    run = run_python("-c", WRITE_AND_COMPARE, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "False"
    assert run.stderr.count("native CPU kernels are off") == 1
    assert "no-such-compiler" in run.stderr


@needs_compiler
def test_with_a_compiler_there_is_a_native_call_and_no_warning():
    run = run_python("-c", WRITE_AND_COMPARE)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "True"
    assert run.stderr == ""


def test_the_command_reports_failure(tmp_path):
    run = run_python("-m", "engine.native", CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert run.returncode == 1
    assert "no-such-compiler" in run.stderr


@pytest.mark.parametrize("command", ['"', "no-such-compiler-anywhere"])
def test_a_compiler_that_is_no_command_is_a_reason_not_a_crash(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", command)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BackendUnsupported):
        build.build_library()


def test_a_user_without_a_home_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(BackendUnsupported, match="set XDG_CACHE_HOME"):
        build.build_library()
