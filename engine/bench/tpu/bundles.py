"""Loops of a compiled TPU program, from the VLIW bundles and the slot table that libtpu dumps.

Predicated code counts as executed, and stalls and waits for DMA are not counted: compare the counts with the
bytes-over-bandwidth floor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s+((?:[A-Z]{2}\s*,?\s*)*):\s*((?:>\s*)*)\{")
_TABLE = "== UTILIZATION:\n"


@dataclass
class Loop:
    """A loop of a compiled program; the program itself is the outermost.

    Attributes:
        first: number of its first bundle.
        last: number of the bundle after its last.
        depth: how many loops enclose it.
        slots: instructions by slot, nested loops counted once.
        children: the loops directly inside.
    """

    first: int
    last: int
    depth: int
    slots: dict[str, int]
    children: list[Loop] = field(default_factory=list)

    @property
    def bundles(self) -> int:
        """Bundles from the first to the last, nested loops counted once."""
        return self.last - self.first

    @property
    def own_bundles(self) -> int:
        """Bundles that are in no nested loop."""
        return self.bundles - sum(child.bundles for child in self.children)

    @property
    def has_matrix_work(self) -> bool:
        """Whether the matrix unit is used, here or in a nested loop."""
        return self.slots["MXU"] > 0

    def walk(self) -> Iterator[Loop]:
        """This loop and all inside, in program order."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class Program:
    """A dumped program.

    Attributes:
        root: the whole program, as one loop.
        capacity: instructions that one bundle can hold, by slot.
    """

    root: Loop
    capacity: dict[str, int]

    def use(self, loop: Loop) -> dict[str, float]:
        """Fraction of each slot that a loop uses, from 0 to 1."""
        return {name: loop.slots[name] / (loop.bundles * most) for name, most in self.capacity.items()}


def read_program(path: Path) -> Program:
    """Reads a program from its file of final bundles and the slot table beside it."""
    table = next(path.parent.glob(path.name.rsplit("-", 2)[0] + "-*utilization.txt")).read_text()
    head, rows = table.split(_TABLE)
    names, most = head.strip().splitlines()[-2:]
    slots = [_slot_name(name) for name in names.split(",")]
    use = [[int(cell) for cell in row.split()] for row in rows.splitlines() if row.strip()]
    marks = [
        ("LB" in match[1], match[2].count(">")) for match in map(_BUNDLE.match, path.read_text().splitlines()) if match
    ]

    def make_loop(first: int, last: int, depth: int) -> Loop:
        totals = [sum(column) for column in zip(*use[first:last], strict=True)] or [0] * len(slots)
        return Loop(first, last, depth, dict(zip(slots, totals, strict=True)))

    root = make_loop(0, len(marks), 0)
    around = [root]
    for first, (begins, depth) in enumerate(marks):
        if begins:
            while around[-1].depth >= depth:
                around.pop()
            loop = make_loop(first, _end(marks, first), depth)
            around[-1].children.append(loop)
            around.append(loop)
    return Program(root, dict(zip(slots, map(int, most.split()), strict=True)))


def _slot_name(name: str) -> str:
    """The slot's short name: of "VLOAD:FILL", vector loads that refill a spilled register, "FILL"."""
    return name.strip().rsplit(":", 1)[-1]


def _end(marks: list[tuple[bool, int]], first: int) -> int:
    """The bundle after a loop's last: where another loop of its depth begins, or the depth stays below its own."""
    depth, last = marks[first][1], first + 1
    for index in range(first + 1, len(marks)):
        begins, here = marks[index]
        if begins and here <= depth:
            break
        if here >= depth:
            last = index + 1
    return last
