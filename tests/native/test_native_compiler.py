"""Building, caching and loading of the native library, and life without it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.errors import BackendUnsupported
from engine.native import compiler, library
from engine.user_files import flaw_of

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


@pytest.mark.slow
@needs_compiler
def test_a_second_build_takes_the_first_ones_file(empty_cache, monkeypatch):
    path = compiler.build_library()
    assert path.is_file()
    assert empty_cache in path.parents
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compiler.build_library() == path


@needs_compiler
def test_simultaneous_builds_agree_and_leave_one_whole_file(empty_cache):
    with ThreadPoolExecutor(2) as threads:
        runs = list(threads.map(lambda _: run_python("-m", "engine.native"), range(2)))
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    assert runs[0].stdout == runs[1].stdout
    assert [path.name for path in (empty_cache / "fused-kv-engine").iterdir()] == [compiler.build_library().name]


@needs_compiler
def test_another_source_or_compiler_is_another_file(empty_cache, monkeypatch, tmp_path):
    first = compiler._fingerprint(("c++",))
    assert compiler._fingerprint(("clang++",)) != first
    source = tmp_path / "scatter.cc"
    source.write_text(compiler.SOURCES[0].read_text() + "// changed\n")
    monkeypatch.setattr(compiler, "SOURCES", (source,))
    assert compiler._fingerprint(("c++",)) != first


@pytest.mark.parametrize(
    "what", ["flag", "jaxlib", "search path", "program", "processor", "file names", "header of jaxlib"]
)
def test_whatever_goes_into_a_build_names_it(what, empty_cache, monkeypatch, tmp_path):
    program, sources = tmp_path / "c++", (tmp_path / "a.cc", tmp_path / "b.cc")
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    sources[0].write_text("xy")
    sources[1].write_text("z")
    headers = tmp_path / "include"
    headers.mkdir()
    (headers / "ffi.h").write_text("1")
    monkeypatch.setattr(compiler, "SOURCES", sources)
    monkeypatch.setattr(compiler.jax.ffi, "include_dir", lambda: str(headers))
    first = compiler._fingerprint((str(program),))
    assert compiler._fingerprint((str(program),)) == first
    if what == "flag":
        monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-ffast-math"))
    elif what == "jaxlib":
        monkeypatch.setattr(compiler, "version", lambda _: "0.0")
    elif what == "search path":
        monkeypatch.setenv("CPATH", str(tmp_path))
    elif what == "program":
        program.write_text("#!/bin/sh\nexit 0\n")
    elif what == "processor":
        monkeypatch.setattr(compiler, "_processor", lambda: "another")
    elif what == "file names":  # the same bytes, one after the other
        sources[0].write_text("x")
        sources[1].write_text("yz")
    else:
        (headers / "ffi.h").write_text("2")
    assert compiler._fingerprint((str(program),)) != first


@pytest.fixture
def compiled(monkeypatch):
    """Compiles nothing: notes where each library is made."""
    made = []

    def fake(_, output):
        made.append(output)
        output.write_text("built")
        output.chmod(0o777)

    monkeypatch.setattr(compiler, "_compile", fake)
    monkeypatch.setattr(compiler, "find_compiler", lambda: ("c++",))
    compiler._own_directory.cache_clear()
    return made


def test_the_cache_and_what_is_in_it_are_their_users_alone_whatever_the_umask(empty_cache, compiled):
    before = os.umask(0)
    try:
        path = compiler.build_library()
    finally:
        os.umask(before)
    assert path.parent == empty_cache / "fused-kv-engine"
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path.parent, path)] == [0o700, 0o700]
    assert compiler.build_library() == path
    assert len(compiled) == 1


@pytest.mark.parametrize("flaw", ["others write", "group writes", "link", "another owner", "a file", "open parent"])
def test_a_directory_that_another_user_can_change_is_not_loaded_from(flaw, empty_cache, compiled, monkeypatch, caplog):
    trusted = compiler.build_library()
    directory, name = trusted.parent, trusted.name
    if flaw in ("others write", "group writes"):
        directory.chmod(0o777 if flaw == "others write" else 0o770)
    elif flaw == "link":
        directory.rename(empty_cache / "theirs")
        directory.symlink_to(empty_cache / "theirs")
    elif flaw == "another owner":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)  # whose is what we made, then
        if os.getuid() == 0:
            os.chown(directory, 12346, 12346)
    elif flaw == "a file":
        trusted.unlink()
        directory.rmdir()
        directory.write_text("")
    else:
        empty_cache.chmod(0o777)
    path = compiler.build_library()
    assert path.name == name
    assert directory not in path.parents
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert compiled[-1].name == name
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(directory) in caplog.text
    assert compiler.build_library() == path  # built once, said once
    assert len(caplog.records) == 1


@pytest.mark.parametrize("flaw", ["others write", "link", "pipe", "another owner"])
def test_a_library_that_another_user_can_change_is_built_again(flaw, empty_cache, compiled, monkeypatch, caplog):
    path = compiler.build_library()
    if flaw == "others write":
        path.chmod(0o777)
    elif flaw == "another owner":
        if os.getuid():
            pytest.skip("only root gives files away")
        os.chown(path, 12346, 12346)
    else:
        path.rename(empty_cache / "theirs")
        path.symlink_to(empty_cache / "theirs") if flaw == "link" else os.mkfifo(path)
    assert compiler.build_library() == path
    assert len(compiled) == 2
    assert flaw_of(path) is None
    assert str(path) in caplog.text


def test_a_missing_compiler_is_named(empty_cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(empty_cache))
    with pytest.raises(BackendUnsupported, match=r"no C\+\+ compiler"):
        compiler.build_library()


@pytest.mark.parametrize("command", ["no-such-compiler", f"{sys.executable} -c raise(SystemExit(3))"])
def test_a_failing_compiler_is_named_and_leaves_nothing(empty_cache, monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(BackendUnsupported, match="set CXX"):
        compiler.build_library()
    assert not any(path.is_file() for path in empty_cache.rglob("*"))


def test_an_unwritable_cache_is_named(empty_cache, monkeypatch):
    blocked = empty_cache / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setenv("CXX", "c++")
    with pytest.raises(BackendUnsupported, match="XDG_CACHE_HOME"):
        compiler.build_library()


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
        compiler.build_library()


def test_a_user_without_a_home_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(BackendUnsupported, match="set XDG_CACHE_HOME"):
        compiler.build_library()
