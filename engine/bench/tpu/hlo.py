"""Facts of a compiled XLA program, from its text."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_NAME = re.compile(r"^\s*(?:ROOT )?%?([\w.\-<>]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-<>]+) \(.*\{\s*$")
_CALLS = re.compile(r"fusion\(.*\bcalls=%?([\w.\-<>]+)")
_SCOPED = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')
_ALIAS = re.compile(r"\{[\d, ]*\}: \(\d+, \{[\d, ]*\}, (?:may|must)-alias\)")
_CALLED = re.compile(r"\b(?:to_apply|body|true_computation|false_computation)=%?([\w.\-<>]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# These name memory; they move and compute nothing.
_NAMES = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
_CALLERS = {"while", "conditional", "call"}
# These make no new array.
_FREE = (_NAMES - {"constant"}) | _CALLERS | {"custom-call"}
ENTRY = "ENTRY"
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a compiled program.

    Attributes:
        name: its name.
        opcode: e.g. "fusion".
        largest: the largest array among its results, e.g. "bf16[8,128]".
        largest_bytes: its bytes.
        line: its whole line.
        computation: the computation that contains it; ``ENTRY`` is the program's own.
    """

    name: str
    opcode: str
    largest: str
    largest_bytes: int
    line: str
    computation: str


def instructions(text: str) -> Iterator[Instruction]:
    """Instructions of a program in the order of its text, except those inside fusions, whose values are not arrays."""
    fused, inside, computation = set(_CALLS.findall(text)), False, ENTRY
    for line in text.splitlines():
        if header := _HEADER.match(line):
            inside, computation = header[2] in fused, ENTRY if header[1] else header[2]
        elif not inside and (match := _NAME.match(line)):
            shape, rest = _split_shape(line[match.end() :])
            opcode = rest.lstrip().split("(", 1)[0]
            largest = max(_ARRAY.finditer(shape), key=_bytes, default=None)
            array, size = (largest[0], _bytes(largest)) if largest else ("", 0)
            yield Instruction(match[1], opcode, array, size, line, computation)


def moves_of_at_least(text: str, size: int) -> list[str]:
    """The instructions that make a new array of at least ``size`` bytes, such as copies and fusions; for messages.

    A result that aliases an operand is not a new array: kernels and loops that update in place are left out.
    """
    return [
        f"{found.opcode} {found.name}: {found.largest_bytes:,} bytes"
        for found in instructions(text)
        if found.largest_bytes >= size and found.opcode not in _FREE
    ]


def launches(text: str) -> int:
    """How many kernels and copies one run of a program launches, one after the other.

    A loop counts as its known number of turns, else as one; of several branches the longest counts; a library call
    counts as one.
    """
    bodies = defaultdict(list)
    for found in instructions(text):
        bodies[found.computation].append(found)

    def of(found: Instruction) -> int:
        if found.opcode in _CALLERS:
            names = _CALLED.findall(found.line)
            names += [name.strip(" %") for names in _BRANCHES.findall(found.line) for name in names.split(",")]
            turns = _TURNS.search(found.line)
            return (int(turns[1]) if turns else 1) * max(sum(map(of, bodies[name])) for name in names)
        return int(found.opcode not in _NAMES and not found.opcode.endswith("-done"))

    return sum(map(of, bodies[ENTRY]))


def kernel_vmem_bytes(text: str) -> dict[str, int]:
    """VMEM that each Pallas kernel of a program takes, by the name of its call."""
    calls = (i for i in instructions(text) if i.opcode == "custom-call" and '"tpu_custom_call"' in i.line)
    return {call.name: int(found[1]) if (found := _SCOPED.search(call.line)) else 0 for call in calls}


def aliases(text: str) -> int:
    """How many results of a program are in the memory of an argument."""
    return len(_ALIAS.findall(text.split("\n", 1)[0]))


def collectives(text: str) -> list[str]:
    """The collectives of a program, each as "opcode shape"; a pair of start and done counts once."""
    found = ((i.opcode.removesuffix("-start"), i.largest) for i in instructions(text))
    return [f"{opcode} {shape}" for opcode, shape in found if opcode in COLLECTIVES]


def _split_shape(text: str) -> tuple[str, str]:
    """The type at the head of an instruction, and the rest: a tuple's ends with its parenthesis."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "({") - (character in ")}")
        if depth == 0 and character == " ":
            return text[:index], text[index:]
    return text, ""


def _bytes(array: re.Match[str]) -> int:
    bits = 8 if array[1] == "pred" else int(re.sub(r"^[a-z]+(\d+).*", r"\1", array[1]))
    return math.prod(int(size) for size in array[2].split(",") if size) * bits // 8
