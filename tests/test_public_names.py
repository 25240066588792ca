import ast
from pathlib import Path

import engine


def test_every_public_name_can_be_had():
    for name in engine.__all__:
        assert getattr(engine, name).__name__ == name


def test_the_stub_types_the_same_names_from_the_same_places():
    stub = ast.parse((Path(engine.__file__).parent / "__init__.pyi").read_text())
    typed = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == engine._HOMES


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(engine, "nothing")
