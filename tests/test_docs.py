"""Pages that are made from the code are those that the code makes now."""

import argparse
import dataclasses
import importlib.util
from pathlib import Path

from engine.cli import add_engine_options
from engine.config import EngineConfig

DOCS = Path(__file__).parents[1] / "docs"


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_options_is_that_of_the_code():
    pages = load("make_options")
    assert pages.PAGE.read_text(encoding="utf-8") == pages.make_page(), "run: make docs-options"


def test_every_option_has_a_flag():
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    given = vars(parser.parse_args([]))
    assert {field.name for field in dataclasses.fields(EngineConfig)} == given.keys() - {"config"}
    assert set(given.values()) == {None}  # unset, so that the file's value counts
