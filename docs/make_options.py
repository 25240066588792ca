"""Writes ``docs/options.md``, the reference of the options of engine and server, from the code and the command line."""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import config
from engine.cli import add_engine_options
from engine.config import CHOICES, EngineConfig
from engine.server import server_options
from engine.server.server_options import SECONDS, ServerOptions, add_server_options

PAGE = Path(__file__).with_name("options.md")
INTRODUCTION = """\
# Options

<!-- Written by `make docs-options` from `engine/config.py`, `engine/cli.py` and `engine/server/server_options.py`. -->

Each option is a field of `EngineConfig`: a keyword argument of `LLM(model, …)`, a key of the table `[engine]` in a TOML
file (`--config`, see `configs/`), and a flag of `python -m engine generate` and `python -m engine serve`. A flag
overrides the file. A wrong value is refused as `ConfigError` before anything is loaded.
"""
SERVER = """
## The server

Flags of `python -m engine serve` ([serving-http.md](serving-http.md)), which are fields of `ServerOptions`.
"""
HEAD = """
| Option | Flag | Type | Default | Values | Meaning |
|---|---|---|---|---|---|
"""
COUNTS = config.COUNTS | server_options.COUNTS


def make_page() -> str:
    """The text of the page."""
    engine = HEAD + _rows(EngineConfig, add_engine_options)
    return INTRODUCTION + engine + SERVER + HEAD + _rows(ServerOptions, add_server_options)


def _rows(options: type[Any], add_options: Callable[[argparse.ArgumentParser], None]) -> str:
    """A row for each field of a class of options."""
    flags, meanings = _flags(add_options), _meanings(options)
    rows = []
    for field in dataclasses.fields(options):
        name = field.name
        cells = [f"`{name}`", f"`{flags[name]}`", f"`{field.type}`".replace("|", "\\|"), f"`{_shown(field.default)}`"]
        rows.append(" | ".join([*cells, _values(name), meanings[name]]))
    return "".join(f"| {row} |\n" for row in rows)


def _flags(add_options: Callable[[argparse.ArgumentParser], None]) -> dict[str, str]:
    """The command line's flag for each option."""
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser)
    return {action.dest: action.option_strings[0] for action in parser._actions}


def _meanings(options: type[Any]) -> dict[str, str]:
    """The text of each attribute in the docstring, on one line."""
    attributes = (inspect.getdoc(options) or "").split("Attributes:\n")[1]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", attributes, re.MULTILINE | re.DOTALL)
    return {name: _sentence(" ".join(text.split())) for name, text in entries}


def _sentence(text: str) -> str:
    code = text.replace("``", "`").replace("|", "\\|")
    return code[0].upper() + code[1:]


def _shown(default: object) -> str:
    return {True: "true", False: "false"}[default] if isinstance(default, bool) else str(default)


def _values(name: str) -> str:
    if name in CHOICES:
        return ", ".join(f"`{choice}`" for choice in CHOICES[name])
    if name in COUNTS:
        least, most = COUNTS[name]
        return f"{least:,} to {most:,}"
    if name in SECONDS:
        shortest, longest = SECONDS[name]
        return f"{shortest:g} to {longest:,g}"
    return ""


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
