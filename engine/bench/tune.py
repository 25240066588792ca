"""Tunes the TPU kernel's block sizes on a real TPU and writes the table of overrides that the kernel reads.

Every trial is saved at once, so that an interrupted run continues where it was; the table is written at the end.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine.attention import AttentionMetadata
from engine.attention.impl.tpu.block_sizes import OVERRIDES, BlockSizes
from engine.attention.impl.tpu.tpu_entry import target_generation
from engine.attention.options import AttentionOptions, HeadArrays
from engine.bench.timing import time_in_turn
from engine.bench.tpu.tuning import CONTEXT, Journal, Mode, Target, candidates, formula, search, write_overrides
from engine.errors import BackendUnsupported
from engine.terminal import count, plain_console

BATCH = 16
PREFILL_TOKENS = 4096
ROUNDS = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("--gen", choices=("v5e", "v6e", "v7x"), help="refuse to run on another generation")
    parser.add_argument("--kv-heads", type=count, nargs="+", default=[8, 1], help="KV heads on a device")
    parser.add_argument("--group", type=count, nargs="+", default=[4, 8], help="query heads a KV head, one for each")
    parser.add_argument("--head-dim", type=count, default=128)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float8_e4m3fn"], help="of the cache")
    parser.add_argument("--pages", type=count, nargs="+", default=[16, 32, 64, 128, 256], help="page sizes in tokens")
    parser.add_argument("--journal", type=Path, default=Path("tune.jsonl"), help="trials so far (default: %(default)s)")
    parser.add_argument("--table", type=Path, default=OVERRIDES, help="table to write (default: the kernel's own)")


def run(args: argparse.Namespace) -> None:
    """Makes all trials, shows progress, and writes the table.

    Raises:
        BackendUnsupported: this is not a TPU that the kernel supports, or not the generation of ``--gen``.
    """
    generation = target_generation()
    if args.gen not in (None, generation):
        raise BackendUnsupported(
            f"cannot tune for {args.gen} on a {generation}: times depend on the machine; run it there"
        )
    targets = [
        Target(generation, heads, group, args.head_dim, page_size, dtype)
        for (heads, group), page_size, dtype in product(
            zip(args.kv_heads, args.group, strict=True), args.pages, args.dtype
        )
    ]
    journal = Journal(args.journal)
    modes: tuple[Mode, ...] = ("decode", "prefill")
    total = sum(len(candidates(target, mode, formula(target))) for target in targets for mode in modes)
    console = plain_console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tuning", total=total)
        for target, trial in search(targets, time_kernel, journal):
            took = "does not compile" if trial.seconds is None else f"{trial.seconds * 1e6:,.0f} µs"
            name = f"{target.heads}x{target.group} page {target.page_size} {target.dtype} {trial.mode}: {took}"
            progress.update(task, advance=1, description=name)
    print(f"{write_overrides(args.table, targets, journal)} of {len(targets)} geometries written to {args.table}")


def time_kernel(target: Target, mode: Mode, blocks: BlockSizes) -> float:
    """Median seconds of one call: 16 decode rows with half of the longest context, or one prompt of 4,096 tokens."""
    step = _Step(target, mode, blocks)
    timings = time_in_turn({"ours": step}, rounds=ROUNDS, calls=10)
    return timings["ours"].median


class _Step:
    """A compiled call over random pages; each call donates its cache to the next."""

    def __init__(self, target: Target, mode: Mode, blocks: BlockSizes) -> None:
        # Only here: Pallas takes long to import.
        from engine.attention.impl.tpu.tpu_step import ragged_paged_attention_tpu

        decode = mode == "decode"
        rows, new, kv_len = (BATCH, 1, CONTEXT // 2) if decode else (1, PREFILL_TOKENS, PREFILL_TOKENS)
        layout, page = target.layout, target.page_size
        pages = CONTEXT // page
        rng = np.random.default_rng(0)
        table = rng.permutation(np.arange(1, rows * pages + 1)).reshape(rows, pages).astype(np.int32)
        bounds = np.arange(rows + 1, dtype=np.int32) * new
        lens = np.full(rows, kv_len, np.int32)
        metadata = AttentionMetadata.build(table, bounds, lens, num_tokens=rows * new, page_size=page)
        self._cache: Any = jnp.zeros(layout.buffer_shape((rows * pages + 1) * page), layout.dtype)
        keys = jax.random.split(jax.random.key(0), 3)
        counts = (target.heads * target.group, target.heads, target.heads)
        self._qkv = [
            jax.random.normal(key, (rows * new, count, target.head_dim), target.query_dtype)
            for key, count in zip(keys, counts, strict=True)
        ]
        self._metadata = jax.device_put(metadata)
        options = AttentionOptions(page, target.head_dim**-0.5)

        def step(cache: Any, qkv: list[Any], metadata: AttentionMetadata) -> Any:
            q, k, v = qkv
            return ragged_paged_attention_tpu(
                q, k, v, cache, metadata, HeadArrays(), options, generation=target.generation, blocks=blocks
            )

        self._run = jax.jit(step, donate_argnums=0).lower(self._cache, self._qkv, self._metadata).compile()

    def __call__(self) -> None:
        out, self._cache = self._run(self._cache, self._qkv, self._metadata)
        out.block_until_ready()
