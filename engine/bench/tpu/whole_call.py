"""A whole attention call of this package: bytes that its kernel moves over those that it must, and an estimated time.

The kernel's DMAs are counted from its block sizes, for a step of equal sequences. Bundles are those of the loops that
the step takes, each with its number of turns, without those before the first item; stalls are not counted. The time is
that of the slower of bundles and bytes. ``programs`` reads from the compiled program what XLA moves beside the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.bench.tpu.bundles import Loop, Program
from engine.bench.tpu.figures import find_lanes

if TYPE_CHECKING:
    from engine.attention.impl.tpu.contract.geometry import Geometry, Tile

CLOCK = {"v5e": 1.5e9, "v6e": 1.75e9, "v7x": 1.9e9}  # bundles a second and core, assumed
BANDWIDTH = {"v5e": 0.82e12, "v6e": 1.64e12, "v7x": 3.7e12}  # bytes a second and core


@dataclass(frozen=True)
class Sequences:
    """The sequences of a step, all equal: how many, new tokens of each, and tokens of each with the new ones."""

    count: int
    q_len: int
    kv_len: int


@dataclass(frozen=True)
class _Block:
    """What an item computes of one fetched block: pages, chunks, steps and edges."""

    pages: int
    chunks: int
    steps: int
    edges: int


def call_figures(gen: str, program: Program, geo: Geometry, step: Sequences) -> dict[str, float]:
    """Bundles, bytes over the necessary ones, and estimated microseconds of a call."""
    kind = next(n for n, tile in enumerate(geo.tiles) if step.q_len <= tile.queries or n == len(geo.tiles) - 1)
    tile = geo.tiles[kind]
    lane, around = find_lanes(program, len(geo.tiles))[kind], _around(program.root, kind, len(geo.tiles))
    bundles, pages = 0.0, 0
    for first in range(0, step.q_len, tile.queries):
        queries = min(tile.queries, step.q_len - first)
        turns = tile.queries // 8, geo.heads
        bundles += around.own_bundles
        bundles += sum(loop.bundles * count for loop, count in zip(_side_loops(around), turns, strict=False))
        for block in _blocks(geo, tile, step.kv_len - step.q_len + first, queries):
            pages += block.pages
            bundles += _block_bundles(lane.block, geo, tile, block)
    token = geo.words * 512
    query = 2 * step.q_len * geo.q_words * 512  # q and out
    new = step.q_len * token * (2 if geo.fresh_tokens else 3)  # K and V are read, merged rows written
    moved = query + new + pages * geo.page_size * token
    seen = min(step.kv_len, (geo.window or step.kv_len) + step.q_len - 1)
    must = query + (2 * step.q_len + seen) * token
    total = bundles * step.count
    return {
        "call bundles": total,
        "call bytes over necessary": moved / must,
        "call microseconds, by bundles": 1e6 * total / CLOCK[gen],
        "call microseconds, by bytes": 1e6 * moved * step.count / BANDWIDTH[gen],
    }


def _around(root: Loop, kind: int, kinds: int) -> Loop:
    """The loop over items of one kind."""
    lanes = [loop for loop in root.children if any(inner.has_matrix_work for inner in loop.children)]
    return lanes[-kinds:][kind]


def _side_loops(around: Loop) -> list[Loop]:
    """Loops of an item beside that over blocks: the queries' scale by groups of 8, and results by head."""
    return [loop for loop in around.children if not loop.has_matrix_work]


def _blocks(geo: Geometry, tile: Tile, position: int, queries: int) -> list[_Block]:
    """The blocks of an item, as ``loops`` and ``items`` compute them."""
    fetch, step = tile.fetch_pages * geo.page_size, tile.edge_pages * geo.page_size
    low = 0 if geo.window is None else max(0, position - geo.window + 1)
    high, found = position + queries, []
    for base in range(low // fetch * fetch, high, fetch):
        end = min(high, base + fetch)
        start = max(low, base)
        pages = -(-end // geo.page_size) - start // geo.page_size
        first, last = (start - base) // step, -(-(end - base) // step)
        whole_low = 0 if geo.window is None else max(position + queries - geo.window - base, 0)
        whole_first = min(max(-(-whole_low // step), first), last)
        whole_last = min(max((position + 1 - base) // step, whole_first), last)
        ratio = tile.chunk_pages // tile.edge_pages
        chunk_first = -(-whole_first // ratio)
        chunks = max(whole_last // ratio - chunk_first, 0)
        steps = whole_last - whole_first - chunks * ratio
        found.append(_Block(pages, chunks, steps, last - first - (whole_last - whole_first)))
    return found


def _block_bundles(loop: Loop, geo: Geometry, tile: Tile, block: _Block) -> float:
    """One turn of the loop over blocks, its inner loops with their turns; pages are contiguous where runs count."""
    # Only here: Pallas takes long to import.
    from engine.attention.impl.tpu.kernel.transfer import group_pages

    fetch = [inner for inner in loop.children if not inner.has_matrix_work]
    compute = [inner for inner in loop.children if inner.has_matrix_work]
    groups, loose = divmod(block.pages, group_pages(geo))
    turns = [block.chunks, block.edges] if len(compute) == 2 else [block.chunks, block.steps, block.edges]
    heads = 1 if tile.queries == 1 else geo.heads
    total: float = loop.own_bundles + groups * fetch[0].own_bundles + loose * fetch[-1].bundles
    for inner, count in zip(compute, turns, strict=True):
        total += count * (inner.own_bundles + sum(child.bundles for child in inner.children) * heads)
    return total
