"""Block sizes: from a table of overrides that a tuner wrote, else by a formula over the target's VMEM."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from math import gcd
from pathlib import Path

from engine.attention.impl.tpu.contract.geometry import Tile
from engine.errors import ConfigError
from engine.kv.layout import LANES, SUBLANES, packing, padded_rows

# VMEM of one core in bytes, by the generation that pltpu.get_tpu_info names.
VMEM_BYTES = {"v5e": 128 << 20, "v6e": 128 << 20, "v7x": 64 << 20}
# Scalar memory for a step's page table and lengths: 1 MiB, less what the kernel itself takes (measured below 5 KiB).
SMEM_BYTES = (1 << 20) - (8 << 10)
# Of VMEM the kernel's buffers take this share; the compiler needs the rest for spills and for what XLA holds across
# the call.
VMEM_SHARE = 0.75
RUN_TOKENS = 512  # tokens of one coalesced DMA: 2 MiB at 8 heads of 128 in bf16
LARGE_PAGE = 128  # tokens; for pages of this size or more one DMA per page costs less than looking for runs
DECODE_FETCH_TOKENS = 4096
DECODE_EDGE_TOKENS = 512  # tokens of the steps in which a decode row ends: what it computes of a context in vain
DECODE_HEAD_TOKENS = 16384  # tokens times unrolled heads of one decode chunk: code size against start-up latency
PREFILL_ROWS = 1024  # rows of q per matrix operand: 2 x 4 tiles of the matrix unit, measured best
SHORT_ROWS = 128  # rows of q of a short extend: one tile of the matrix unit
PREFILL_FETCH_TOKENS = 1024
PREFILL_CHUNK_TOKENS = 512
# A list of objects with OVERRIDE_KEYS and "blocks", the fields of BlockSizes; `lanes` is the stored head_dim.
OVERRIDES = Path(__file__).with_name("overrides.json")
OVERRIDE_KEYS = ("generation", "heads", "group", "lanes", "page_size", "dtype")


@dataclass(frozen=True)
class BlockSizes:
    """How much is fetched and how much is computed at once.

    Attributes:
        decode_fetch_pages: pages of one DMA block for a decode row.
        decode_chunk_pages: pages of one compute chunk for a decode row; divides ``decode_fetch_pages``.
        prefill_queries: query tokens of one work item.
        prefill_fetch_pages: pages of one DMA block for a prefill item.
        prefill_chunk_pages: pages of one compute chunk for a prefill item; divides ``prefill_fetch_pages``.
    """

    decode_fetch_pages: int
    decode_chunk_pages: int
    prefill_queries: int
    prefill_fetch_pages: int
    prefill_chunk_pages: int


@functools.cache
def load_overrides(path: Path = OVERRIDES) -> dict[tuple[str | int, ...], BlockSizes]:
    """Reads the table of overrides: the values of ``OVERRIDE_KEYS`` to block sizes.

    Raises:
        ConfigError: an entry lacks a key or has an unknown one, or its chunks do not divide its fetch blocks.
    """
    table = {}
    for entry in json.loads(path.read_text()):
        sizes = entry.get("blocks", {})
        if entry.keys() != {*OVERRIDE_KEYS, "blocks"} or sizes.keys() != {
            f.name for f in dataclasses.fields(BlockSizes)
        }:
            raise ConfigError(f"{path.name}: {entry} must have {', '.join(OVERRIDE_KEYS)} and all of blocks; tune anew")
        blocks = BlockSizes(**sizes)
        if (
            blocks.decode_fetch_pages % blocks.decode_chunk_pages
            or blocks.prefill_fetch_pages % blocks.prefill_chunk_pages
        ):
            raise ConfigError(f"{path.name}: in {entry} a chunk does not divide its fetch block; tune anew")
        table[tuple(entry[key] for key in OVERRIDE_KEYS)] = blocks
    return table


def make_tiles(blocks: BlockSizes, group: int, page_size: int) -> tuple[Tile, ...]:
    """The kinds of item: decode rows, short extends where a whole block would be far too large, and whole blocks."""
    whole = blocks.prefill_queries
    short = max(SUBLANES, SHORT_ROWS // group // SUBLANES * SUBLANES)
    decode_rows = -(-group // SUBLANES) * SUBLANES
    chunk = edge = blocks.decode_chunk_pages
    while edge % 2 == 0 and edge * page_size > DECODE_EDGE_TOKENS and edge // 2 * page_size % LANES == 0:
        edge //= 2
    return (
        Tile(1, decode_rows, blocks.decode_fetch_pages, chunk, edge),
        *(
            Tile(queries, queries * group, blocks.prefill_fetch_pages, *[blocks.prefill_chunk_pages] * 2)
            for queries in ((short, whole) if 4 * short <= whole else (whole,))
        ),
    )


def vmem_limit(generation: str, needed: int | None = None) -> int:
    """Bytes of VMEM that the compiler may use: the most of any kernel, or of one whose buffers take ``needed``.

    No more than it needs, so that XLA keeps the small arrays of the step in VMEM: on v7x it did not, beside all of it.
    """
    most = int(VMEM_BYTES[generation] * 0.9)
    if needed is None:
        return most
    return min(most, max(int(VMEM_BYTES[generation] * 0.7), needed + VMEM_BYTES[generation] // 12))


def run_pages(page_size: int, blocks: BlockSizes) -> int:
    """Pages of one coalesced DMA: a divisor of both fetch blocks, or 1 where pages are large."""
    if page_size >= LARGE_PAGE:
        return 1
    return gcd(1 << (RUN_TOKENS // page_size).bit_length() - 1, blocks.decode_fetch_pages, blocks.prefill_fetch_pages)


def choose_blocks(
    *,
    generation: str,
    heads: int,
    group: int,
    lanes: int,
    dtype: str,
    page_size: int,
    longest: int,
    mean: int | None = None,
    window: int | None = None,
) -> BlockSizes:
    """Chooses fetch and compute blocks: what a tuner found on a real TPU, else by formula.

    Args:
        generation: "v5e", "v6e" or "v7x".
        heads: KV heads on this device.
        group: query heads per KV head.
        lanes: stored head_dim.
        dtype: name of the cache's dtype.
        page_size: tokens per page.
        longest: longest context in tokens that the page table can name.
        mean: usual context of a decode row in tokens; None takes half of the most that it sees.
        window: tokens that a query sees; None is all before it.

    Returns:
        Sizes that fit ``VMEM_SHARE`` of the target's VMEM; where none do, the smallest.
    """
    found = load_overrides().get((generation, heads, group, lanes, page_size, dtype))
    if found is not None:
        return found
    words = padded_rows(heads, dtype) // packing(dtype) * lanes // LANES
    bytes_per_token = (words | 1) * 4 * LANES
    unit = LANES // gcd(LANES, page_size)  # pages of the smallest chunk whose tokens fill whole registers
    unit_tokens = unit * page_size
    budget = int(VMEM_BYTES[generation] * VMEM_SHARE)

    def pages(tokens: int, most: int) -> int:
        """Whole units of at most ``tokens`` (at least one), and no more than ``most`` tokens need."""
        return unit * max(1, min(tokens, -(-most // unit_tokens) * unit_tokens) // unit_tokens)

    rows = PREFILL_ROWS
    while rows > 128 and _prefill_bytes(heads, group, rows, lanes) > 0.6 * budget:
        rows //= 2
    room = max(budget - _prefill_bytes(heads, group, rows, lanes), budget // 4) // (2 * bytes_per_token)
    # A chunk is computed whole, so one far longer than a usual row would be mostly masked.
    queries = max(8, rows // group // 8 * 8)
    seen, seen_by_block = (min(longest, (window or longest) + others) for others in (0, queries))
    usual = max(LANES, mean or seen // 2)
    decode_chunk = pages(min(max(256, DECODE_HEAD_TOKENS // heads), DECODE_FETCH_TOKENS, usual, room), seen)
    prefill_chunk = pages(min(PREFILL_CHUNK_TOKENS, room), seen_by_block)
    return BlockSizes(
        decode_fetch_pages=_multiple(pages(min(DECODE_FETCH_TOKENS, room), seen), decode_chunk),
        decode_chunk_pages=decode_chunk,
        prefill_queries=queries,
        prefill_fetch_pages=_multiple(pages(min(PREFILL_FETCH_TOKENS, room), seen_by_block), prefill_chunk),
        prefill_chunk_pages=prefill_chunk,
    )


def _prefill_bytes(heads: int, group: int, rows: int, lanes: int) -> int:
    """Bytes of the softmax state in float32, and of q and out twice each, with a dead word for each query."""
    return heads * rows * (4 * (2 * LANES + lanes) + 4 * 4 * lanes) + rows // group * 4 * 4 * LANES


def _multiple(value: int, unit: int) -> int:
    return max(1, value // unit) * unit
