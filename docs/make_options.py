"""Writes ``docs/options.md``, the reference of the engine's options, from ``EngineConfig`` and the command line."""

import argparse
import dataclasses
import inspect
import re
from pathlib import Path

from engine.cli import add_engine_options
from engine.config import CHOICES, COUNTS, EngineConfig

PAGE = Path(__file__).with_name("options.md")
INTRODUCTION = """\
# Options

<!-- Written by `make docs-options` from `engine/config.py` and `engine/cli.py`; change those. -->

Each option is a field of `EngineConfig`: a keyword argument of `LLM(model, …)`, a key of the table `[engine]` in a TOML
file (`--config`, see `configs/`), and a flag of `python -m engine generate`. A flag overrides the file. A wrong value
is refused as `ConfigError` before anything is loaded.

| Option | Flag | Type | Default | Values | Meaning |
|---|---|---|---|---|---|
"""


def make_page() -> str:
    """The text of the page."""
    flags, meanings = _flags(), _meanings()
    rows = []
    for field in dataclasses.fields(EngineConfig):
        name = field.name
        cells = [f"`{name}`", f"`{flags[name]}`", f"`{field.type}`".replace("|", "\\|"), f"`{_shown(field.default)}`"]
        rows.append(" | ".join([*cells, _values(name), meanings[name]]))
    return INTRODUCTION + "".join(f"| {row} |\n" for row in rows)


def _flags() -> dict[str, str]:
    """The command line's flag for each option."""
    parser = argparse.ArgumentParser(add_help=False)
    add_engine_options(parser)
    return {action.dest: action.option_strings[0] for action in parser._actions}


def _meanings() -> dict[str, str]:
    """The text of each attribute in the docstring, on one line."""
    attributes = (inspect.getdoc(EngineConfig) or "").split("Attributes:\n")[1]
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
    return ""


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
