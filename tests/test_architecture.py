"""The rooms of the design: who may import whom, which room is free of jax, how long a file may grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[1] / "engine"
FILES = sorted(ENGINE.rglob("*.py"))

# A room may import rooms with a smaller number. memory and kv share a number: neither may import the other.
LEVEL = {
    "devices": 0,
    "errors": 0,
    "config": 1,
    "terminal": 1,
    "version": 1,
    "user_files": 1,
    "distributed": 2,
    "native": 2,
    "planning": 2,
    "kv": 3,
    "memory": 3,
    "attention": 4,
    "models": 5,
    "serving": 6,
    "cli": 7,
    "bench": 7,
    "__main__": 8,
    "__init__": 8,
}
CONTROL_PLANE = ["memory", "planning", "serving/plan", "serving/request.py", "serving/device/batcher.py"]
LONGEST_FILE = 400
KERNELS = {name: ENGINE / "attention" / "impl" / name / "kernel" for name in ("tpu", "gpu")}
# What a kernel may import of the project.
AROUND_KERNEL = {"tpu": ("engine.kv.",), "gpu": ("engine.attention.impl.gpu.work",)}
LONGEST_KERNEL = 900  # lines, all files together, docstrings and blanks too: what one can read in one sitting


def room_of(path: Path) -> str:
    return path.relative_to(ENGINE).parts[0].removesuffix(".py")


def imported_modules(path: Path, *, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ENGINE)))
def test_imports_run_downward(path):
    room = room_of(path)
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "engine" and parts[1] != room:
            assert LEVEL[parts[1]] < LEVEL[room], f"{room} may not import {parts[1]}"


@pytest.mark.parametrize("place", CONTROL_PLANE)
def test_the_control_plane_is_free_of_jax(place):
    path = ENGINE / place
    for file in [path] if path.suffix else sorted(path.rglob("*.py")):
        for name in imported_modules(file):
            assert name.split(".")[0] not in ("jax", "jaxlib", "flax"), f"{file} imports {name}"


def test_the_memory_room_runs_without_loading_jax():
    code = "import sys, engine.memory.manager; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ENGINE)))
def test_a_file_holds_one_idea(path):
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_stays_short_enough_to_be_read_whole(name):
    files = sorted(KERNELS[name].rglob("*.py"))
    assert len(files) > 5
    assert sum(len(path.read_text().splitlines()) for path in files) < LONGEST_KERNEL


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_imports_nothing_that_is_around_it(name):
    for path in sorted(KERNELS[name].rglob("*.py")):
        for module in imported_modules(path):
            inside = module.startswith((f"engine.attention.impl.{name}.kernel.", *AROUND_KERNEL[name]))
            assert inside or not module.startswith("engine"), f"{path.name} imports {module}"


def test_only_the_layout_slices_heads_by_hand():
    for path in FILES:
        if room_of(path) != "bench" and path.name != "layout.py":
            source = path.read_text().replace(" ", "")
            assert "::2,:]" not in source, f"{path} repeats the rule of the layout"
