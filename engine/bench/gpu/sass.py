"""Reads the dumps of a Mosaic GPU kernel: the assembler's report, the resources, and the machine code's loops."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from engine.errors import BackendUnsupported

_LABEL = re.compile(r"^\.(L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^\n]*)")
_JUMP = re.compile(r"\.(L_x_\d+)\)")
_PRODUCT = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")  # rows, columns, summed-over elements
_USED = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_WARNING = re.compile(r"C75\d\d[^\n]*|[Ss]etmaxnreg[^\n]*ignored[^\n]*")
_SHARED = re.compile(r"smem_scratch_bytes=(\d+)")
BARRIER_BYTES = 8
_BARRIERS = re.compile(r"num_barriers=(\d+)[^:]*: (\d+)")


@dataclass(frozen=True)
class Loop:
    """A loop: from the target of a backward branch to the branch.

    Attributes:
        first: number of its first instruction.
        last: number of the branch.
        counts: number of instructions by opcode, which is taken without the part after a dot.
        products: number of products by shape: rows, columns, summed-over elements.
    """

    first: int
    last: int
    counts: dict[str, int]
    products: dict[tuple[int, int, int], int]

    @property
    def flops(self) -> int:
        """FLOPs of the products of one turn."""
        return sum(2 * rows * columns * depth * times for (rows, columns, depth), times in self.products.items())

    @property
    def instructions(self) -> int:
        """Instructions of one turn, if every branch in it falls through."""
        return self.last - self.first + 1

    def holds(self, other: Loop) -> bool:
        """Whether the other loop is inside this one."""
        return self != other and self.first <= other.first and other.last <= self.last


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled.

    Attributes:
        name: its name in the program.
        registers: registers of a thread at its start.
        spilled_bytes: bytes stored to or loaded from local memory.
        shared_bytes: bytes of shared memory, barriers included.
        warnings: the assembler's warnings that mean a slower kernel.
        loops: every loop, the innermost of several first.
    """

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warnings: list[str]
    loops: list[Loop]

    def innermost(self, opcode: str) -> list[Loop]:
        """The innermost loops with an opcode; waiting loops out of line do not count."""
        having = [loop for loop in self.loops if loop.counts.get(opcode) and not loop.counts.get("NANOSLEEP")]
        return [loop for loop in having if not any(loop.holds(other) for other in having)]


def read_kernel(sass: Path) -> Kernel:
    """Reads ``NAME_N.sass_ctrl``, the ``.ptxas`` beside it, and the last ``NAME_M.resources.txt`` with M up to N.

    Newer versions number the two separately when a kernel is compiled again.

    Raises:
        BackendUnsupported: the assembler's report or the resources have an unknown form.
    """
    report, name, number = sass.with_suffix(".ptxas").read_text(), *sass.stem.rsplit("_", 1)
    numbers = (int(path.name.split(".")[0].rsplit("_", 1)[1]) for path in sass.parent.glob(f"{name}_*.resources.txt"))
    last = max(n for n in numbers if n <= int(number))
    resources = (sass.parent / f"{name}_{last}.resources.txt").read_text()
    used, spills = _USED.search(report), _SPILLS.findall(report)
    shared = _SHARED.search(resources)
    if not (used and spills and shared):
        # Zeros instead would pass every check.
        raise BackendUnsupported(f"cannot read the resources of {name}: the report has another form:\n{report}")
    barriers = sum(int(number) * int(times) for number, times in _BARRIERS.findall(resources))
    return Kernel(
        name=name,
        registers=int(used[1]),
        spilled_bytes=sum(int(stores) + int(loads) for stores, loads in spills),
        shared_bytes=int(shared[1]) + BARRIER_BYTES * barriers,
        warnings=_WARNING.findall(report),
        loops=read_loops(sass.read_text()),
    )


def read_loops(text: str) -> list[Loop]:
    """The loops of a kernel's machine code, as the disassembler writes it with labels."""
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.search(line):
            code.append((found[1], found[2]))
    loops = []
    for last, (opcode, operands) in enumerate(code):
        target = _JUMP.search(operands) if opcode.startswith("BRA") else None
        first = labels.get(target[1], len(code)) if target else len(code)
        if first <= last:
            names = [name for name, _ in code[first : last + 1]]
            counts = Counter(name.split(".")[0] for name in names)
            shapes = Counter((int(m[1]), int(m[2]), int(m[3])) for m in map(_PRODUCT.match, names) if m)
            loops.append(Loop(first, last, dict(counts), dict(shapes)))
    return loops
