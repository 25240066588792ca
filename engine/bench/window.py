"""A layer with a window in a long context: against the same layer in a context of one window, and full attention.

Each sequence decodes one token, or one sequence computes a chunk of its prompt at the end of its context. All read the
same pool, at random pages. What a step does once for all layers of a group is timed apart: looking up the group's pages
and the slots of the new tokens. For a TPU, which need not be present, bundles of the compiled kernel are counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from engine.attention import AttentionMetadata, FlashAttentionBackend
from engine.attention.window_table import WindowTable
from engine.bench.attention import Problem, Step, in_place, make_step
from engine.bench.timing import median_ratio, print_table, time_in_turn
from engine.bench.tpu.aot import TOPOLOGIES
from engine.bench.tpu_static import measure
from engine.planning.units import format_bytes
from engine.serving.device.batcher import parcel_shapes
from engine.serving.device.device_rows import DeviceRows
from engine.serving.device.parcel import StepParcel
from engine.serving.device.runner import read_parcel
from engine.terminal import count

ROWS = 64  # sequences of the step whose page table is looked up
LONG, SHORT, FULL = "window in the context", "in one window", "full attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--window", type=count, default=1024, help="tokens that a query sees")
    parser.add_argument("--context", type=count, default=32768, help="tokens of each sequence, with the new ones")
    parser.add_argument("--impl", nargs="*", default=["cpu", "xla"], choices=("cpu", "xla", "gpu"), metavar="IMPL")
    parser.add_argument("--batch", type=count, default=4, help="sequences that decode")
    parser.add_argument("--chunk", type=count, default=256, help="new tokens of the prefill")
    parser.add_argument("--page-size", type=count, default=16, help="tokens")
    parser.add_argument("--rounds", type=count, default=9)
    parser.add_argument("--tpu", choices=TOPOLOGIES, help="also compile the TPU kernel for this generation and count")


def run(args: argparse.Namespace) -> None:
    """Prints a table for each implementation, for the lookup of the pages, and for the TPU kernel."""
    shape = f"window of {args.window:,}, context of {args.context:,}, pages of {args.page_size}"
    print(f"{shape}; jax {jax.__version__} on {jax.default_backend()}; ms, medians of {args.rounds} rounds")
    rows = []
    for impl in args.impl:
        for mode, batch, q_len in (("decode", args.batch, 1), ("prefill", 1, args.chunk)):
            rows.append(_compared(f"{impl}, {mode} {batch} x {q_len}", _layers(args, impl, batch, q_len), args.rounds))
    rows.append(_compared(f"page lookup, {ROWS} rows", _lookups(args), 10 * args.rounds))
    print_table(["", LONG, SHORT, FULL, "context / window", "full / window"], rows)
    if args.tpu:
        _print_tpu(args)


def _compared(name: str, contenders: dict[str, Callable[[], object]], rounds: int) -> list[str]:
    timings = time_in_turn(contenders, rounds=rounds)
    ratios = median_ratio(timings[LONG], timings[SHORT]), median_ratio(timings[FULL], timings[LONG])
    return [name, *(f"{timings[each].median * 1e3:.2f}" for each in (LONG, SHORT, FULL)), *(f"{r:.2f}" for r in ratios)]


def _layers(args: argparse.Namespace, impl: str, batch: int, q_len: int) -> dict[str, Callable[[], object]]:
    """Calls of a layer: with a window at the end of the context and of one window, and with full attention."""
    problem = Problem(batch, args.context, q_len, 32, 8, 128, args.page_size, "bfloat16")
    step = make_step(problem)
    full = FlashAttentionBackend(page_size=args.page_size, num_q_heads=32, num_kv_heads=8, head_dim=128, impl=impl)
    window = replace(full, sliding_window=args.window)
    short = _cut_off(step, problem, args.window + q_len - 1)
    return {LONG: in_place(window, step), SHORT: in_place(window, short), FULL: in_place(full, step)}


def _cut_off(step: Step, problem: Problem, context: int) -> Step:
    """The same step where each sequence's context is its last ``context`` tokens, in the pages where they are."""
    columns = -(-context // problem.page_size)
    metadata = AttentionMetadata.build(
        np.asarray(step.metadata.page_table)[:, -columns:],
        np.asarray(step.metadata.cu_q_lens),
        np.full(problem.batch, context),
        num_tokens=problem.batch * problem.q_len,
        page_size=problem.page_size,
    )
    return replace(step, metadata=metadata.to_device())


def _lookups(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What the device does with the parcel of a decode step, with the page table of one group."""
    cases = {LONG: (args.window, args.context), SHORT: (args.window, args.window), FULL: (None, args.context)}
    return {name: _lookup(args.page_size, *case) for name, case in cases.items()}


def _lookup(page_size: int, window: int | None, context: int) -> Callable[[], object]:
    pages = -(-context // page_size)
    shape = parcel_shapes(ROWS, ROWS, page_size)[-1]
    parcel = StepParcel.padding(shape)
    parcel.req_pool_idx[:], parcel.kv_lens[:], parcel.cu_q_lens[:] = np.arange(ROWS), context, np.arange(ROWS + 1)
    table = WindowTable.of(window, page_size, pages, step_tokens=ROWS, devices=1)
    read = jax.jit(partial(read_parcel, shape, (table,)), donate_argnums=0)
    rows = DeviceRows.empty(ROWS, 1, pages)

    def call() -> None:
        nonlocal rows
        rows, *rest = read(rows, parcel.packed)
        jax.block_until_ready(rest)

    return call


def _print_tpu(args: argparse.Namespace) -> None:
    """Counts a decode row of the compiled kernel: the bundles of the chunks that it computes."""
    pages = -(-args.context // args.page_size)
    table = WindowTable.of(args.window, args.page_size, pages, step_tokens=ROWS, devices=1)
    shape = {"gen": args.tpu, "page_size": args.page_size, "batch": ROWS, "tokens": ROWS}
    cases: list[dict[str, Any]] = [
        {**shape, "context": table.columns * args.page_size, "window": args.window},
        {**shape, "context": args.context},
    ]
    rows = []
    for name, seen, case, found in zip((LONG, FULL), (args.window, args.context), cases, measure(cases), strict=True):
        chunk = int(found["decode chunk tokens"])
        computed = (-(-(seen - 1) // chunk) + 1) * chunk if seen < args.context else -(-seen // chunk) * chunk
        bundles = computed * found["decode bundles per token"]
        scalars = 4 * ROWS * -(-case["context"] // args.page_size)
        rows.append([name, f"{chunk:,}", f"{computed:,}", f"{bundles:,.0f}", format_bytes(scalars)])
    print_table([f"{args.tpu}, decode", "chunk", "tokens a row, at most", "bundles", "page table"], rows)
