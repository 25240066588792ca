"""The rooms of the design: which room may import which, folders without jax, and limits for rooms and functions."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[1] / "engine"
FILES = sorted(ENGINE.rglob("*.py"))

# A room may import rooms with a smaller number. memory and kv share a number: neither may import the other.
LEVEL = {
    "devices": 0,
    "errors": 0,
    "config": 1,
    "layer_groups": 1,
    "terminal": 1,
    "version": 1,
    "user_files": 1,
    "distributed": 2,
    "native": 2,
    "planning": 2,
    "kv": 3,
    "memory": 3,
    "attention": 4,
    "trace": 4,
    "models": 5,
    "serving": 6,
    "server": 7,
    "cli": 8,
    "bench": 8,
    "__main__": 9,
    "__init__": 9,
}
# Within a room a folder or file may import those with smaller numbers. What is not named is on top of the room, where
# files may import one another.
TOP = 9
LEVEL_WITHIN = {
    "memory": {"integers": 0, "one_caller": 0, "scope": 0, "pages": 1, "prefix": 2, "offload": 3},
    "serving": {
        "answer_text": -1,
        "sampling_params": -1,
        "request": 0,
        "interrupts": 0,
        "gate": 0,
        "plan": 1,
        "device": 2,
        "watch": 3,
    },
}
# The device half of serving fills parcels from planned steps, and knows nothing else of the plan.
OF_THE_PLAN_FOR_THE_DEVICE = "engine.serving.plan.step."
NO_JAX = ["memory", "planning", "serving/plan", "trace"]
# Modules that an engine uses on a host without loading jax, with all that they import.
RUN_WITHOUT_JAX = [
    "engine.memory.manager",
    "engine.memory.offload.store",
    "engine.planning.host_memory",
    "engine.serving.plan.scheduler",
    "engine.serving.device.batcher",
]
# Lines of Python in all files of a room: to grow beyond it is a decision, and is made here.
MOST_LINES = {
    "attention": 4800,
    "bench": 8300,
    "distributed": 750,
    "kv": 2150,
    "memory": 6950,
    "models": 3150,
    "native": 270,
    "planning": 460,
    "server": 2300,
    "serving": 7000,
    "trace": 2100,
}
# Lines of a function's body without its docstring: one screen, which is held in the head at once. The longest function,
# one lane of the TPU kernel's loop, has 50.
LONGEST_FUNCTION = 50
NAMED_BY_PYTHON = ("__init__.py", "__main__.py")
KERNELS = {name: ENGINE / "attention" / "impl" / name / "kernel" for name in ("tpu", "gpu")}
# What a kernel may import of the project.
AROUND_KERNEL = {
    "tpu": ("engine.kv.", "engine.attention.impl.tpu.contract."),
    "gpu": ("engine.attention.impl.gpu.work",),
}
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


@pytest.mark.parametrize("room", LEVEL_WITHIN)
def test_imports_within_a_room_run_downward(room):
    levels = LEVEL_WITHIN[room]
    for path in sorted((ENGINE / room).rglob("*.py")):
        here = path.relative_to(ENGINE / room).parts[0].removesuffix(".py")
        for name in imported_modules(path):
            if not name.startswith(f"engine.{room}."):
                continue
            there = name.split(".")[2]
            lower = levels.get(there, TOP) <= levels.get(here, TOP)
            assert here == there or lower, f"{path.relative_to(ENGINE)} may not import {name}"


def test_the_device_half_of_serving_knows_of_the_plan_only_its_steps():
    for path in sorted((ENGINE / "serving" / "device").rglob("*.py")):
        for name in imported_modules(path):
            if name.startswith("engine.serving.plan"):
                assert name.startswith(OF_THE_PLAN_FOR_THE_DEVICE), f"{path.name} imports {name}"


@pytest.mark.parametrize("folder", NO_JAX)
def test_the_control_plane_is_free_of_jax(folder):
    for file in sorted((ENGINE / folder).rglob("*.py")):
        for name in imported_modules(file):
            assert name.split(".")[0] not in ("jax", "jaxlib", "flax"), f"{file} imports {name}"


@pytest.mark.parametrize("module", RUN_WITHOUT_JAX)
def test_the_control_plane_runs_without_loading_jax(module):
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_room_grows_by_decision():
    lines = Counter()
    for path in FILES:
        if len(path.relative_to(ENGINE).parts) > 1:
            lines[room_of(path)] += len(path.read_text().splitlines())
    assert lines.keys() == MOST_LINES.keys()
    too_large = {room: count for room, count in lines.items() if count > MOST_LINES[room]}
    assert not too_large


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ENGINE)))
def test_a_function_is_held_in_the_head_at_once(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            assert not body or node.end_lineno - body[0].lineno < LONGEST_FUNCTION, f"{path}: {node.name} is too long"


def test_no_two_files_have_one_name():
    outside_bench = [path for path in FILES if room_of(path) != "bench"]
    names = Counter(path.name for path in outside_bench if path.name not in NAMED_BY_PYTHON)
    assert not {name for name, count in names.items() if count > 1}


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
