"""The work of a step as the kernels read it: int32 arrays of fixed size."""

from __future__ import annotations

from typing import Any, NamedTuple


class Chunks(NamedTuple):
    """The decode rows of a step, cut into chunks; int32.

    Attributes:
        row: ``[C]`` each chunk's row of the page table.
        low: ``[C]`` first position of the chunk that the query sees.
        high: ``[C]`` one past the last such position.
        count: ``[1]`` number of chunks.
    """

    row: Any
    low: Any
    high: Any
    count: Any


class Rows(NamedTuple):
    """Where the chunks and tokens of a step's decode rows are; int32.

    Attributes:
        first: ``[B]`` index of each row's first chunk.
        count: ``[B]`` number of its chunks; 0 where it is not a decode row.
        token: ``[B]`` index of its token in the step.
        live: ``[2]`` index of the first token that belongs to a sequence, and one past the last.
    """

    first: Any
    count: Any
    token: Any
    live: Any


class Tiles(NamedTuple):
    """The new tokens of a step's longer rows, cut into tiles; int32.

    Attributes:
        row: ``[N]`` each tile's row of the page table.
        token: ``[N]`` index of its first token in the step.
        valid: ``[N]`` number of its tokens that belong to its sequence.
        position: ``[N]`` position of its first token in its sequence.
        kv_len: ``[N]`` length of its sequence in tokens.
        count: ``[1]`` number of tiles.
    """

    row: Any
    token: Any
    valid: Any
    position: Any
    kv_len: Any
    count: Any


class StepWork(NamedTuple):
    """The work of one step.

    Attributes:
        table: ``[B, P']`` ids of the pages that each row holds, else the null page; wide enough for whole loop steps.
        chunks: the chunks of the decode rows.
        rows: where those chunks and their tokens are.
        tiles: the tiles of the longer rows.
    """

    table: Any
    chunks: Chunks
    rows: Rows
    tiles: Tiles
