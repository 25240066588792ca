"""What pages and rooms say of the code is so: generated pages, paths, links, names, tables of files."""

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import engine
from engine.cli import add_engine_options
from engine.config import EngineConfig

ROOT = Path(__file__).parents[1]
DOCS, ENGINE = ROOT / "docs", ROOT / "engine"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# Decisions keep the names of their time; what they say of files today is not held to it.
LIVING = [page for page in PAGES if page.parent.name != "adr"]
ROOMS = sorted(path.parent for path in ENGINE.rglob("__init__.py") if "bench" not in path.parts)
NOT_LISTED = ("__init__", "__main__")


def relative(path):
    return str(path.relative_to(ROOT))


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_options_is_that_of_the_code():
    pages = load("make_options")
    assert pages.PAGE.read_text(encoding="utf-8") == pages.make_page(), "run: make docs-options"


def test_the_pictures_are_those_that_the_command_draws():
    pictures = load("make_pictures")
    drawn = pictures.make_all()
    for name, text in drawn.items():
        ElementTree.fromstring(text)
        assert (pictures.FOLDER / name).read_text(encoding="utf-8") == text, "run: make docs-pictures"
    shown = {name for page in PAGES for name in re.findall(r"[(/]([\w-]+\.svg)\)", page.read_text(encoding="utf-8"))}
    assert shown == drawn.keys()


def test_every_page_is_in_the_navigation_of_the_site():
    config = yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r"[\w/.-]+\.md", str(config["nav"])))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert listed == pages | {"changelog.md", "contributing.md"}


def test_the_reference_has_every_public_name_and_each_can_be_had():
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    names = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    for name in names:
        module, attribute = longest_module(name)
        assert hasattr(module, attribute), name
    assert {name.rpartition(".")[2] for name in names} == set(engine.__all__)


def test_every_option_has_a_flag():
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    given = vars(parser.parse_args([]))
    assert {field.name for field in dataclasses.fields(EngineConfig)} == given.keys() - {"config"}
    assert set(given.values()) == {None}  # unset, so that the file's value counts


@pytest.mark.parametrize("page", LIVING, ids=relative)
def test_every_path_that_a_page_names_exists(page):
    paths = re.findall(r"(?<![\w/-])(?:engine|tests|docs|configs)/[\w./-]*\w/?", page.read_text(encoding="utf-8"))
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_within_the_project_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", LIVING, ids=relative)
def test_every_dotted_name_that_a_page_mentions_can_be_had(page):
    for name in set(re.findall(r"`(engine(?:\.\w+)+)[`(]", page.read_text(encoding="utf-8"))):
        module, *attributes = longest_module(name)
        for attribute in attributes:
            assert hasattr(module, attribute), f"{name} is gone"
            module = getattr(module, attribute)


def longest_module(name):
    """The longest part of a dotted name that is a module, imported, and the names behind it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            return importlib.import_module(".".join(parts[:end])), *parts[end:]
        except ModuleNotFoundError:
            continue
    raise AssertionError(f"{name} is no module")


def test_the_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in sorted(DOCS.glob("*.md")) if f"docs/{page.name}" not in readme]


@pytest.mark.parametrize("room", ROOMS, ids=relative)
def test_a_room_lists_its_files(room):
    tree = ast.parse((room / "__init__.py").read_text())
    files = {path.stem for path in room.glob("*.py")} - set(NOT_LISTED)
    folders = {path.name for path in room.iterdir() if (path / "__init__.py").exists()}
    if room == ENGINE or "kernel" in room.parts:
        return
    names = {entry for line in ast.get_docstring(tree).splitlines() for entry in listed_in(line)}
    assert names >= files | folders
    assert not [name for name in names if not any((room / each).exists() for each in (name, f"{name}.py"))]


def listed_in(line):
    """The files that a line of a table lists: names, with two spaces or more before what is said of them."""
    found = re.match(r" *((?:[\w.]+/?, )*[\w.]+/?)  +\S", line)
    return [name.removesuffix(".py").rstrip("/") for name in found.group(1).split(", ")] if found else []


def test_the_index_of_the_design_names_what_is_there():
    rows = re.findall(r"^\| .*? \| (`engine/[\w/]+\.py`) \| (.*) \|$", (DOCS / "design.md").read_text(), re.MULTILINE)
    assert len(rows) > 25
    for row in rows:
        quoted = re.findall(r"`([^`]+)`", " ".join(row))
        files = [ROOT / each for each in quoted if each.endswith(".py")]
        defined = set().union(*(names_defined_in(ast.parse(file.read_text())) for file in files))
        names = {each for each in quoted if "/" not in each}
        assert names
        assert not names - defined, f"not in {quoted[0]}, nor in another file that the row names"


def names_defined_in(tree, prefix=""):
    """Functions, classes and variables of a module, and what its classes have, as ``Class.name``."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            names |= names_defined_in(node, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_every_test_that_the_documents_name_is_there():
    root, named = DOCS.parent, set()
    for page in DOCS.glob("*.md"):
        for path, names in re.findall(r"`(tests/[\w/]+\.py)::(\w+`(?:, `::\w+`)*)", page.read_text()):
            named |= {(path, name) for name in re.findall(r"\w+", names)}
    assert named
    assert not [(path, name) for path, name in named if f"def {name}(" not in (root / path).read_text()]
