import ast
import importlib
import subprocess
import sys
from pathlib import Path

import engine

# Names whose home loads jax: all of the data plane, and the engine on top.
WITH_JAX = ("engine.attention", "engine.distributed", "engine.kv", "engine.memory.offload.store", "engine.serving")
ALIASES = {"PageMove"}  # unions of types, which have no name of their own


def test_every_public_name_can_be_had():
    for name in engine.__all__:
        public = getattr(engine, name)
        assert public == getattr(importlib.import_module(engine._HOMES[name]), name)
        assert name in ALIASES or public.__name__ == name


def test_the_stub_types_the_same_names_from_the_same_places():
    stub = ast.parse((Path(engine.__file__).parent / "__init__.pyi").read_text())
    typed = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == engine._HOMES
    (names,) = [node.value for node in stub.body if isinstance(node, ast.Assign)]
    assert sorted(ast.literal_eval(names)) == engine.__all__


def test_the_names_of_the_control_plane_are_had_without_jax():
    names = [name for name, home in engine._HOMES.items() if not home.startswith(WITH_JAX)]
    assert {"CacheManager", "CacheScope", "PageMove", "PagePool", "ReqToTokenPool"} <= set(names)
    code = f"import sys; from engine import {', '.join(names)}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(engine, "nothing")
