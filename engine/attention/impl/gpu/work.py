"""The work of a step as the kernels read it: integer arrays of fixed size."""

from __future__ import annotations

from typing import Any, NamedTuple


class Chunks(NamedTuple):
    """The decode rows of a step, cut up; int32.

    Attributes:
        row: ``[C]`` of the page table.
        low: ``[C]`` first position of the chunk that the query sees.
        high: ``[C]`` one past the last.
        count: ``[1]`` chunks that there are.
    """

    row: Any
    low: Any
    high: Any
    count: Any


class Rows(NamedTuple):
    """Where the decode rows of a step are; int32.

    Attributes:
        first: ``[B]`` of each row's chunks.
        count: ``[B]`` of its chunks; 0 where it is no decode row.
        token: ``[B]`` its token in the step.
        live: ``[2]`` the first token of the step that some sequence claims, and one past the last.
    """

    first: Any
    count: Any
    token: Any
    live: Any


class Tiles(NamedTuple):
    """The new tokens of a step's longer rows, cut into tiles; int32.

    Attributes:
        row: ``[N]`` of the page table.
        token: ``[N]`` the tile's first token, of the step's.
        valid: ``[N]`` tokens of the tile that are its sequence's.
        position: ``[N]`` where its first token stands in its sequence.
        kv_len: ``[N]`` the sequence's length.
        count: ``[1]`` tiles that there are.
    """

    row: Any
    token: Any
    valid: Any
    position: Any
    kv_len: Any
    count: Any


class StepWork(NamedTuple):
    """One step's work.

    Attributes:
        table: ``[B, P']`` page ids of what each row holds, else the null page; wide enough for whole steps.
        chunks: of the decode rows.
        rows: where those chunks and their tokens are.
        tiles: of the longer rows.
    """

    table: Any
    chunks: Chunks
    rows: Rows
    tiles: Tiles
