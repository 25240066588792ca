"""What is handed out: the sdist is a whole source tree, the wheel has what it needs to run, make says what it needs."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import engine
from engine import version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What a build or a test run leaves in a tree, and what is no part of it.
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", "*.egg-info", "build", "dist", ".*_cache", ".hypothesis", "shared"
)
needs_setuptools = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="setuptools, which builds the package, is not installed"
)


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The tree that was built, the sdist's files and the wheel's."""
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    before = files_of(tree)
    code = "from setuptools import build_meta as b; print(b.build_sdist('out')); print(b.build_wheel('out'))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(next((tree / "out").glob("*.tar.gz"))) as archive:
        sdist = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    with zipfile.ZipFile(next((tree / "out").glob("*.whl"))) as archive:
        wheel = {name: archive.read(name) for name in archive.namelist()}
    return before, sdist, wheel


@needs_setuptools
def test_the_sdist_is_the_whole_source_tree(built):
    tree, sdist, _ = built
    assert tree <= sdist, sorted(tree - sdist)
    for needed in ("Makefile", "LICENSE", ".ci/run", "configs/llama-3-8b.toml", "docs/design.md", "tests/conftest.py"):
        assert needed in sdist


@needs_setuptools
def test_the_wheel_has_all_of_the_package_its_licence_and_its_command(built):
    tree, _, wheel = built
    package = {name for name in tree if name.startswith("engine/")}
    assert package <= wheel.keys(), sorted(package - wheel.keys())
    assert {"engine/py.typed", "engine/__init__.pyi"} <= package
    about = f"fused_kv_engine-{PROJECT['version']}.dist-info"
    assert b"fused-kv-engine = engine.__main__:main" in wheel[f"{about}/entry_points.txt"]
    assert wheel[f"{about}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"License-Expression: Apache-2.0" in wheel[f"{about}/METADATA"]
    assert not [name for name in wheel if name.split("/")[0] not in ("engine", about)]


def test_the_licence_is_apaches_whole_text():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert [f"\n   {number}. " in text for number in range(1, 10)] == [True] * 9
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_version_is_that_of_the_source_tree_or_of_what_is_installed(monkeypatch, tmp_path):
    assert engine.__version__ == PROJECT["version"]
    monkeypatch.setattr(version, "__file__", str(tmp_path / "engine" / "version.py"))
    monkeypatch.setattr(version, "version", lambda name: f"that of {name}")
    assert engine.__version__ == "that of fused-kv-engine"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\nversion = "9"\n')
    assert engine.__version__ == "that of fused-kv-engine"


def test_what_pyproject_names_is_what_is_installed_or_nothing_is():
    try:
        installed = importlib.metadata.metadata(version.NAME)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed here")
    assert installed["Name"] == PROJECT["name"] == version.NAME


def fake_python(folder, body):
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def make(folder, *arguments):
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
OLD = f"""exec {sys.executable} -c 'import sys; sys.version_info = (3, 10, 13); exec(sys.argv[1])' "$2" """


@needs_make
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (OLD, f"found 3.10 at {sys.executable}"),
        ("exit 127", "found none that runs as"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "found one without venv"),
    ],
)
def test_make_says_which_python_it_needs_before_it_makes_anything(tmp_path, body, message):
    done = make(tmp_path, "run", f"PYTHON={fake_python(tmp_path, body)}")
    assert done.returncode == 2
    assert "needs Python 3.11 or later" in done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists()


@needs_make
def test_make_without_any_python_says_so(tmp_path):
    done = make(tmp_path, "test", "PYTHON=no-such-python")
    assert done.returncode == 2
    assert "found none that runs as no-such-python" in done.stderr


@needs_make
def test_a_half_made_environment_is_made_again_and_a_whole_one_is_kept(tmp_path):
    half = tmp_path / ".venv"
    (half / "bin").mkdir(parents=True)
    (half / "pyvenv.cfg").write_text("home = /nowhere\n")
    (half / "bin" / "python").symlink_to("/nowhere/python")
    done = make(tmp_path, ".venv/.made", f"PYTHON={sys.executable}")
    assert done.returncode == 0, done.stderr
    found = subprocess.run([half / "bin" / "python", "-c", "import pip"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    (half / "mine").touch()
    (half / ".made").unlink()
    assert make(tmp_path, ".venv/.made", "PYTHON=no-such-python").returncode == 0
    assert (half / "mine").exists()
