"""The cost of an attention kernel's loops: bundles per KV token in decode, FLOPs per bundle in prefill.

Both kernels are counted in the same way: one turn of the loop over fetched blocks, with the turns of the compute loop
inside, the DMAs that it issues and all other bundles of the block. That is set against the tokens, or the FLOPs, of
the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.bench.tpu.bundles import Loop, Program
from engine.errors import BackendUnsupported

if TYPE_CHECKING:
    from engine.attention.impl.tpu.contract.geometry import Geometry


@dataclass(frozen=True)
class Lane:
    """The loops of decode, or of prefill.

    Attributes:
        block: the loop with one turn per fetched block.
        fetch: the loop that issues the DMAs of a block, one turn per run of pages; single pages are in loops inside.
        chunk: the loop with one turn per compute chunk that needs no mask.
        hot: the innermost loop of the chunk; one turn per head where the heads are a loop.
    """

    block: Loop
    fetch: Loop
    chunk: Loop
    hot: Loop

    def bundles(self, chunks: int, groups: int, turns: int, *, scattered: bool) -> float:
        """Bundles of one block.

        Args:
            chunks: compute chunks of a block.
            groups: runs of pages of a block.
            turns: turns of the hot loop in a chunk; 1 where it is the chunk.
            scattered: whether no run is contiguous.
        """
        nested = max((loop.bundles for loop in self.fetch.children), default=0)
        group = self.fetch.own_bundles + scattered * nested
        chunk = self.chunk.bundles + (turns - 1) * self.hot.bundles
        inner = [loop for loop in self.block.children if loop is self.fetch or loop.has_matrix_work]
        rest = self.block.bundles - sum(loop.bundles for loop in inner)
        return chunks * chunk + groups * group + rest


def find_lanes(program: Program, kinds: int) -> list[Lane]:
    """The loops of this package's kernel, one lane per kind of item: decode first, whole blocks of queries last.

    A loop over blocks contains a loop that issues DMAs and loops with matrix work: first for the chunks that need no
    mask, perhaps for smaller steps, and then for the edges.

    Args:
        program: the kernel's program.
        kinds: how many kinds of item the kernel has.

    Raises:
        BackendUnsupported: the program has another number of such loops, because the kernel has changed.
    """
    lanes = []
    for block in program.root.walk():
        compute = [loop for loop in block.children if loop.has_matrix_work]
        fetch = [loop for loop in block.children if not loop.has_matrix_work]
        if len(compute) in (2, 3) and fetch and block.depth:
            chunk = compute[0]
            inner = [loop for loop in chunk.walk() if loop.has_matrix_work]
            lanes.append(Lane(block, fetch[0], chunk, inner[-1]))
    if len(lanes) != kinds:
        raise BackendUnsupported(
            f"cannot read the kernel's loops: {len(lanes)} loops over blocks, but {kinds} kinds of item; "
            "adapt engine/bench/tpu/figures.py to the kernel"
        )
    return lanes


def our_figures(program: Program, geo: Geometry) -> dict[str, float]:
    """Figures of this package's kernel, one program for decode and prefill."""
    # Only here: Pallas takes long to import.
    from engine.attention.impl.tpu.kernel.transfer import group_pages

    decode, *shorter, prefill = find_lanes(program, len(geo.tiles))
    tile, size = geo.tiles[0], geo.page_size
    chunks, groups = tile.fetch_pages // tile.chunk_pages, tile.fetch_pages // group_pages(geo)
    tokens = tile.fetch_pages * size
    found = {
        f"decode bundles per token{name}": decode.bundles(chunks, groups, 1, scattered=scattered) / tokens
        for name, scattered in (("", False), (", scattered pages", True))
    }
    found["decode chunk tokens"] = tile.chunk_pages * size
    found["decode bundles per token, compute alone"] = decode.chunk.bundles / (tile.chunk_pages * size)
    found |= _hot_loop("decode", program, decode.hot)
    tile = geo.tiles[-1]
    chunks, groups = tile.fetch_pages // tile.chunk_pages, tile.fetch_pages // group_pages(geo)
    turns = 1 if prefill.hot is prefill.chunk else geo.heads
    flops = 4 * geo.lanes * tile.rows * tile.chunk_pages * size  # of one head and chunk
    block = prefill.bundles(chunks, groups, turns, scattered=False)
    for short in shorter:
        found["short extend over a whole block"] = short.bundles(chunks, groups, turns, scattered=False) / block
    found["prefill FLOPs per bundle"] = flops * chunks * geo.heads / block
    found["prefill FLOPs per bundle, compute alone"] = flops * geo.heads / turns / prefill.hot.bundles
    found |= _hot_loop("prefill", program, prefill.hot)
    return found


def rival_figures(
    decode: Program, prefill: Program, *, decode_tokens: int, prefill_flops: int, chunks: int
) -> dict[str, float]:
    """Figures of tpu-inference's kernels.

    Args:
        decode: its decode program, in which one turn of the compute loop takes a whole block.
        prefill: its mixed program.
        decode_tokens: tokens of a decode block.
        prefill_flops: FLOPs of one turn of the prefill program's compute loop, all heads.
        chunks: turns of that loop in a block.
    """
    hot, around = _innermost(decode.root)
    found = {
        "decode bundles per token": around.bundles / decode_tokens,
        "decode bundles per token, scattered pages": around.bundles / decode_tokens,
        "decode bundles per token, compute alone": hot.bundles / decode_tokens,
    } | _hot_loop("decode", decode, hot)
    hot, around = _innermost(prefill.root)
    block = around.bundles + (chunks - 1) * hot.bundles
    found |= {
        "prefill FLOPs per bundle": prefill_flops * chunks / block,
        "prefill FLOPs per bundle, compute alone": prefill_flops / hot.bundles,
    }
    return found | _hot_loop("prefill", prefill, hot)


def _innermost(root: Loop) -> tuple[Loop, Loop]:
    """The deepest loop with matrix work (the larger of two equally deep ones), and the loop around it."""
    pairs = [(child, loop) for loop in root.walk() for child in loop.children if child.has_matrix_work]
    return max(pairs, key=lambda pair: (pair[0].depth, pair[0].bundles))


def _hot_loop(mode: str, program: Program, hot: Loop) -> dict[str, float]:
    use = {
        f"{mode} hot loop {name} use": share
        for name, share in program.use(hot).items()
        if name not in ("FILL", "SPILL")
    }
    return {
        f"{mode} hot loop bundles": hot.bundles,
        f"{mode} hot loop spills": hot.slots["SPILL"],
        f"{mode} hot loop fills": hot.slots["FILL"],
    } | use
