"""The commands of the pages are those of the program: each is read by its own parser, and the cheap ones run."""

import argparse
import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from itertools import pairwise

import pytest
from page_blocks import PAGES, ROOT, blocks, blocks_of, commands_in, name_of, of_the_program

from engine import cli
from engine.bench.__main__ import make_parser as bench_parser
from engine.server.bodies import ChatBody, CompletionBody

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
BODIES = {"/v1/completions": CompletionBody, "/v1/chat/completions": ChatBody}
ELSEWHERE = ("git", "cd", "sudo", "apt-get", "python3", ". ")  # of the system


def check(words):
    """Raises where a command is not one that its program knows."""
    program, arguments = of_the_program(words)
    if program == "engine":
        args = parsed(cli._parser(), arguments)
        if args.command == "launch":
            check(["fused-kv-engine", *args.words[1:]])
    elif program == "engine.bench":
        parsed(bench_parser(), arguments)
    elif program:
        assert (ROOT / f"{program.replace('.', '/')}.py").exists(), program
    elif words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS
    elif words[0].endswith("pip") or words[1:3] == ["-m", "pip"]:
        check_install(words)
    elif words[0] == "curl":
        check_curl(words)
    elif words[0].endswith("python"):
        assert (ROOT / words[1]).exists() or words[1] == "-m", words
    elif words[0].endswith("pytest"):
        assert all((ROOT / word).exists() for word in words[1:] if "/" in word), words
    else:
        assert words[0] in ELSEWHERE or words[0].endswith(("/ruff", "/mypy")), f"{words[0]}: teach the test to check it"


def parsed(parser, arguments):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args(arguments)
    except SystemExit as end:
        if end.code == 0:  # --help, --version
            return argparse.Namespace(command="help")
        raise AssertionError(f"refused: {shlex.join(arguments)}: {said.getvalue()}") from None


def check_install(words):
    for word in words:
        if found := re.match(r"(?:\.|[\w-]+)\[([\w,]+)\]", word):
            assert set(found[1].split(",")) <= PROJECT["optional-dependencies"].keys()


def check_curl(words):
    url = next(word for word in words if word.startswith("http"))
    path = "/" + url.split("/", 3)[3]
    if "-d" in words:
        BODIES[path].model_validate(json.loads(words[words.index("-d") + 1]))


@pytest.mark.parametrize("block", blocks("shell"), ids=str)
def test_the_commands_of_a_block_are_known(block):
    commands = commands_in(block.text)
    assert commands
    for words in commands:
        check(words)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "adr"], ids=name_of)
def test_the_commands_in_a_sentence_are_known(page):
    for command in re.findall(r"`(python -m engine[^`]*)`", page.read_text(encoding="utf-8")):
        words = shlex.split(" ".join(command.split()).replace("…", "0"))
        if len(words) > 3 and words[3:] != ["trace"]:  # a group of commands
            check(words)


def cheap(words):
    """Whether a command takes seconds, and what it needs is here."""
    program, arguments = of_the_program(words)
    return program == "engine" and arguments[0] in ("plan", "--version") and "DIR" not in arguments


@pytest.mark.parametrize("block", [b for b in blocks("shell") if any(map(cheap, commands_in(b.text)))], ids=str)
def test_cheap_commands_run(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in filter(cheap, commands_in(block.text)):
        arguments = []
        for word in of_the_program(words)[1]:
            arguments += sorted(map(str, ROOT.glob(word))) if "*" in word else [word]
        assert exit_code(arguments) == 0


def exit_code(arguments):
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return end.code


def shown(*, examples):
    """Commands, and what the page says that each prints: those that run an example, or the others."""
    for page in PAGES:
        for before, block in pairwise(blocks_of(page)):
            if before.language == "shell" and block.note == "prints":
                (words,) = commands_in(before.text)
                if words[1].startswith("docs/examples") == examples:
                    yield pytest.param(words, block.text, id=str(before))


@pytest.mark.parametrize(("words", "expected"), [*shown(examples=True)])
def test_an_example_prints_what_the_page_shows(words, expected, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", words[1:])
    runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    assert capsys.readouterr().out == expected


@pytest.mark.slow
@pytest.mark.parametrize(("words", "expected"), [*shown(examples=False)])
def test_a_command_prints_what_the_page_shows(words, expected):
    program, arguments = of_the_program(words)
    command = [sys.executable, "-m", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == expected


def test_every_example_is_explained_and_run_by_a_test():
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    run = [case.values[0][1] for case in shown(examples=True)]
    for example in (ROOT / "docs" / "examples").glob("*.py"):
        assert f"(examples/{example.name})" in page
        assert f"docs/examples/{example.name}" in run or f'"{example.name}"' in tests
