"""The blocks of code of the pages, and what a page says about each.

A block is fenced and names its language: ``python``, ``shell``, or data (``toml``, ``yaml``, ``json``, ``jsonl``). What
cannot be run is ``text``, and the comment in the line above it says why: ``<!-- not run: a diagram -->``. The comment
``<!-- prints -->`` says that the block before prints exactly this text.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SERVER = "http://127.0.0.1:8000"  # what pages call the server of which they speak
_FENCE = re.compile(r"^(?:<!-- (?P<note>.*?) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"(?<=\n\n)(?P<text>(?:    [^\n]*\n|\n)+)", re.M)


@dataclass(frozen=True)
class Block:
    """A block of a page; the language is "" where it has no fence or names none."""

    page: Path
    line: int
    language: str
    text: str
    note: str | None = None

    def __str__(self):
        return f"{name_of(self.page)}, line {self.line}"


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks_of(page):
    """Every block of a page, in order."""
    source = page.read_text(encoding="utf-8")
    fenced = list(_FENCE.finditer(source))
    blocks = [_block(page, source, each, each["language"], each["note"]) for each in fenced]
    rest = list(source)
    for each in fenced:  # fences out of the way, lines kept
        rest[each.start() : each.end()] = ["\n" if letter == "\n" else "." for letter in each.group()]
    text = "".join(rest)
    blocks += [
        _block(page, source, each, "")
        for each in _INDENTED.finditer(text)
        if each["text"].strip() and not _continues_a_list(text[: each.start()])
    ]
    return sorted(blocks, key=lambda block: block.line)


def _block(page, source, found, language, note=None):
    line = source.count("\n", 0, found.start("text"))
    return Block(page, line, language, found["text"], note)


def _continues_a_list(before):
    """Whether an indented paragraph belongs to the entry of a list above it."""
    last = before.rstrip().rsplit("\n\n", 1)[-1]
    return bool(re.match(r"\s*(?:[-*]|\d+\.) ", last))


def blocks(*languages):
    """The blocks of all pages in these languages."""
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]


def pages_of(*, clients):
    """The pages with Python, either those whose blocks need a server or the others."""
    python = {page: [block for block in blocks_of(page) if block.language == "python"] for page in PAGES}
    return [page for page, found in python.items() if found and any(SERVER in b.text for b in found) == clients]


def run_page(page, capsys, change=str):
    """Runs the blocks of Python of a page in one namespace, checks what they print, and returns the namespace."""
    names, printed = {"__name__": "__page__"}, None
    for block in blocks_of(page):
        if block.language == "python":
            # Errors name the line of the page.
            exec(compile("\n" * block.line + change(block.text), str(page), "exec"), names)
            printed = capsys.readouterr().out
        elif block.language == "text" and block.note == "prints" and printed is not None:
            assert block.text == printed, f"{block}: not what the block before prints"
        else:
            printed = None
    return names


def commands_in(text):
    """The commands of a block, as lists of words: comments dropped, lines joined that end with a backslash."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def of_the_program(words):
    """The program of a command and its arguments: "engine", "engine.bench", or None where it is another."""
    if words[0] == "fused-kv-engine":
        return "engine", words[1:]
    if words[0].endswith("python") and words[1:2] == ["-m"] and words[2].startswith("engine"):
        return words[2], words[3:]
    return None, words
