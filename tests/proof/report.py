"""Visits the scopes and writes what was visited into docs/proof.md; ``--slow`` visits the larger ones too.

A table is written anew only where all its rows were visited; so the one of the larger scopes needs ``--slow``.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path

from liveness import visited_to_the_end
from scopes import MANAGER, SCHEDULER, NamedScope

PAGE = Path(__file__).parents[2] / "docs" / "proof.md"


def row(room: str, name: str, named: NamedScope) -> str:
    found = named.explore()
    to_the_end = ""
    if room == "scheduler":
        to_the_end = str(visited_to_the_end(found))
    depth = f"{found.depth}, {'all' if found.is_complete else 'cut there'}"
    line = (
        f"| {room} | {name}: {named.about} | {found.states:,} | {found.transitions:,} | {depth} | {to_the_end} | "
        f"{found.seconds:.1f} |"
    )
    print(line, flush=True)
    return line


def table(*, is_slow: bool) -> str:
    rooms = {"manager": MANAGER, "scheduler": SCHEDULER}
    rows = [
        row(room, name, named)
        for room, scopes in rooms.items()
        for name, named in scopes.items()
        if named.is_slow == is_slow
    ]
    head = (
        "| of | scope | states | transitions | depth | moves to the end | processor s |\n|---|---|---|---|---|---|---|"
    )
    date, machine = datetime.date.today().isoformat(), f"{os.cpu_count()} cores {platform.machine()}"
    return f"{head}\n" + "\n".join(rows) + f"\n\n{date}, {machine}, Python {platform.python_version()}."


def written(page: str, name: str, text: str) -> str:
    """The page with ``text`` between the two marks of ``name``."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = page.split(begin)
    return f"{before}{begin}{text}\n{end}{rest.split(end)[1]}"


def main() -> None:
    for is_slow, name in ((False, "small scopes"), (True, "larger scopes")):
        if not is_slow or "--slow" in sys.argv[1:]:
            text = table(is_slow=is_slow)
            PAGE.write_text(written(PAGE.read_text(), name, text))


if __name__ == "__main__":
    main()
