"""Block sizes to try for the TPU kernel, the journal of trials, and the table that ``choose_blocks`` reads."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from engine.attention.impl.tpu.block_sizes import (
    OVERRIDE_KEYS,
    VMEM_BYTES,
    VMEM_SHARE,
    BlockSizes,
    choose_blocks,
    load_overrides,
)
from engine.attention.options import AttentionOptions
from engine.errors import BackendUnsupported
from engine.kv.layout import KVLayout

Mode = Literal["decode", "prefill"]
MODES: tuple[Mode, ...] = ("decode", "prefill")
CONTEXT = 8192  # tokens of the longest context that the tuner measures
FETCH_TOKENS = (512, 1024, 2048, 4096)
CHUNK_TOKENS = (256, 512, 1024, 2048)
PREFILL_ROWS = (256, 512, 1024, 2048)


@dataclass(frozen=True)
class Target:
    """The geometry of one entry of the table.

    Attributes:
        generation: "v5e", "v6e" or "v7x".
        heads: KV heads on a device.
        group: query heads a KV head.
        head_dim: elements per head.
        page_size: tokens per page.
        dtype: name of the cache's dtype.
    """

    generation: str
    heads: int
    group: int
    head_dim: int
    page_size: int
    dtype: str

    @property
    def layout(self) -> KVLayout:
        """The layout of a pool on a TPU."""
        return KVLayout.create(
            head_num=self.heads, head_dim=self.head_dim, dtype=self.dtype, page_size=self.page_size, platform="tpu"
        )

    @property
    def query_dtype(self) -> Any:
        """float32 for a float32 cache, else bfloat16."""
        return jnp.float32 if self.dtype == "float32" else jnp.bfloat16

    def entry(self, blocks: BlockSizes) -> dict[str, Any]:
        """The key of its entry in the table of overrides."""
        values = dataclasses.asdict(self) | {"lanes": self.layout.lanes}
        return {key: values[key] for key in OVERRIDE_KEYS} | {"blocks": dataclasses.asdict(blocks)}


Timer = Callable[[Target, Mode, BlockSizes], float]
"""Median seconds of one call; raises where the sizes do not compile."""


def formula(target: Target) -> BlockSizes:
    """The sizes that the kernel uses now: the start of the search."""
    return choose_blocks(
        generation=target.generation,
        heads=target.heads,
        group=target.group,
        lanes=target.layout.lanes,
        dtype=target.dtype,
        page_size=target.page_size,
        longest=CONTEXT,
    )


def candidates(target: Target, mode: Mode, start: BlockSizes) -> list[BlockSizes]:
    """``start`` and the sizes of one mode to try in its place; sizes of decode do not affect prefill, nor the reverse.

    Chunks divide their fetch block and are whole pages, and all of the kernel's scratch fits the part of VMEM that the
    formula allows. Where not even ``start`` fits, its trial fails and says why.
    """
    found: list[BlockSizes] = []
    for fetch, chunk in product(FETCH_TOKENS, CHUNK_TOKENS):
        if chunk > fetch or chunk % target.page_size:
            continue
        pages = {
            f"{mode}_fetch_pages": fetch // target.page_size,
            f"{mode}_chunk_pages": chunk // target.page_size,
        }
        if mode == "decode":
            found.append(dataclasses.replace(start, **pages))
            continue
        for rows in PREFILL_ROWS:
            queries = max(8, rows // target.group // 8 * 8)
            found.append(dataclasses.replace(start, prefill_queries=queries, **pages))
    others = [blocks for blocks in dict.fromkeys(found) if blocks != start]
    return [start, *(blocks for blocks in others if fits(target, blocks))]


def fits(target: Target, blocks: BlockSizes) -> bool:
    """Whether the kernel's buffers fit the part of VMEM that the formula allows."""
    try:
        return scratch_bytes(target, blocks) <= VMEM_BYTES[target.generation] * VMEM_SHARE
    except BackendUnsupported:
        return False


def scratch_bytes(target: Target, blocks: BlockSizes) -> int:
    """VMEM that the kernel's buffers take with these sizes; BackendUnsupported where the core has less."""
    # Only here: Pallas takes long to import, and no other benchmark needs it.
    from engine.attention.impl.tpu import tpu_step

    layout = target.layout
    cache = jax.ShapeDtypeStruct(layout.buffer_shape(2 * target.page_size), layout.dtype)
    q = jax.ShapeDtypeStruct((blocks.prefill_queries, target.heads * target.group, target.head_dim), target.query_dtype)
    geo = tpu_step.make_geometry(
        q,
        target.heads,
        cache,
        AttentionOptions(target.page_size, 1.0),
        (1, CONTEXT // target.page_size),
        generation=target.generation,
        blocks=blocks,
    )
    return tpu_step.scratch_bytes(geo)


@dataclass(frozen=True)
class Trial:
    """One measurement; ``seconds`` is None where the sizes do not compile, and ``failed`` says why."""

    target: Target
    mode: Mode
    blocks: BlockSizes
    seconds: float | None
    failed: str = ""


class Journal:
    """Trials on disk, one line as soon as each is done, so that an interrupted search continues where it was.

    Args:
        path: the file; made where there is none. A truncated last line is ignored, and its trial is measured again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.trials: list[Trial] = []
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                values = json.loads(line)
                parts = {"target": Target(**values["target"]), "blocks": BlockSizes(**values["blocks"])}
                self.trials.append(Trial(**values | parts))
        if text and not text.endswith("\n"):
            path.write_text(text[: text.rfind("\n") + 1])

    def find(self, target: Target, mode: Mode, blocks: BlockSizes) -> Trial | None:
        """The trial of these sizes, or None."""
        return next((t for t in self.trials if (t.target, t.mode, t.blocks) == (target, mode, blocks)), None)

    def add(self, trial: Trial) -> None:
        """Adds a trial, in memory and on disk."""
        self.trials.append(trial)
        with self._path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(trial)) + "\n")


def search(targets: Sequence[Target], timer: Timer, journal: Journal) -> Iterator[tuple[Target, Trial]]:
    """Makes every trial that the journal does not have, and yields all trials, old ones too.

    The trials of prefill use the fastest sizes of decode. A trial that does not compile is recorded as failed.
    """
    for target in targets:
        start = formula(target)
        for mode in MODES:
            for blocks in candidates(target, mode, start):
                trial = journal.find(target, mode, blocks)
                if trial is None:
                    trial = _try(target, mode, blocks, timer)
                    journal.add(trial)
                yield target, trial
            start = best(journal, target, mode) or start


def _try(target: Target, mode: Mode, blocks: BlockSizes, timer: Timer) -> Trial:
    try:
        return Trial(target, mode, blocks, timer(target, mode, blocks))
    except Exception as error:  # the compiler's errors have no type of their own
        return Trial(target, mode, blocks, None, f"{type(error).__name__}: {error}"[:500])


def best(journal: Journal, target: Target, mode: Mode) -> BlockSizes | None:
    """The fastest sizes of a mode, or None where none compiled."""
    timed = [(t.seconds, t) for t in journal.trials if (t.target, t.mode) == (target, mode) and t.seconds is not None]
    return min(timed, key=lambda pair: pair[0])[1].blocks if timed else None


def write_overrides(path: Path, targets: Sequence[Target], journal: Journal) -> int:
    """Writes the fastest sizes of each target into the table, atomically; entries of other targets stay.

    Returns:
        Number of targets that have an entry now: those with a compiled trial of prefill, the last mode.
    """
    found = [target.entry(blocks) for target in targets if (blocks := best(journal, target, MODES[-1]))]
    keys = [[entry[key] for key in OVERRIDE_KEYS] for entry in found]
    kept = json.loads(path.read_text()) if path.exists() else []
    kept = [entry for entry in kept if [entry[key] for key in OVERRIDE_KEYS] not in keys]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([*kept, *found], indent=2) + "\n")
    os.replace(partial, path)
    load_overrides.cache_clear()
    return len(found)
