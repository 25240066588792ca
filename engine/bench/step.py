"""The host's time in a decode step, phase by phase, and the gain when it overlaps with the device's.

Every sequence decodes one token per step, with a model so small that the device finishes soon. To time the phases, the
benchmark waits for each step before its tokens are read, so that no phase contains time of the device, which has a
column of its own. The rival is the plain way to feed a step, on the same sequences: a loop over requests, whole
page-table rows and slots per token, one transfer per array. For overlap, two engines take turns and whole steps are
timed. Two layers of which one has a window are two groups: their host time is compared with that of one group; and that
of an engine that records its decisions with that of one that does not.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engine.bench.timing import median_ratio, print_table, replaced, time_in_turn, timed
from engine.models.decoder import Decoder
from engine.models.model_config import ModelConfig
from engine.serving.llm import LLM
from engine.serving.sampling_params import SamplingParams
from engine.terminal import count

PAGE_SIZE, CONTEXT, WINDOW = 16, 2048, 128
PARTS = ("schedule", "fill", "transfer, dispatch", "commit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--batch", type=count, nargs="+", default=[16, 64, 256], help="running sequences")
    parser.add_argument("--steps", type=count, default=200, help="measured steps")
    parser.add_argument("--rounds", type=count, default=15, help="rounds of ten steps, with and without overlap")
    parser.add_argument("--hidden", type=count, default=64, help="width of the model")


def run(args: argparse.Namespace) -> None:
    """Prints the phases for every batch size, whole steps with and without overlap, and what a second group costs."""
    model = make_model(args.hidden)
    rows: list[list[str]] = []
    totals: dict[int, float] = {}
    for batch in args.batch:
        engine = DecodingEngine(model, batch, overlap=False)
        parts, device, moved, compiles = engine.measure(args.steps)
        totals[batch] = sum(parts.values())
        plain = engine.measure_plain_feed(args.steps)
        values = [*parts.values(), totals[batch]]
        cells = [f"{value:.0f}" for value in (*values, device, plain)]
        rows.append([f"{batch} sequences", *cells, moved])
        print(f"{batch} sequences: {compiles} compiles after warm-up", flush=True)
    print(f"host microseconds per step, medians of {args.steps}; jax {jax.__version__} on {jax.default_backend()}")
    print_table(["", *PARTS, "read, rest", "host", "device", "plain feed", "sent, read a step"], rows)
    least, most = min(args.batch), max(args.batch)
    print(f"{most / least:.0f} times the batch costs the host {totals[most] / totals[least]:.1f} times as much")
    _compare(model, most, args.rounds)
    _compare_groups(args.hidden, args.batch, args.rounds)
    _compare_recording(model, args.batch, args.rounds)


def make_model(hidden: int, windows: tuple[int | None, ...] = (None,)) -> Decoder:
    """A model with random weights, of a layer for each of ``windows``."""
    geometry = ModelConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=len(windows),
        layer_windows=windows,
        model_type="mistral",
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        eos_token_id=(),
    )
    return Decoder(geometry, dtype=jnp.float32, rngs=nnx.Rngs(0))


class DecodingEngine:
    """An engine in which every slot decodes, at positions spread evenly over a page.

    Args:
        model: the weights.
        batch: sequences.
        overlap: see ``EngineConfig.overlap_steps``.
        record: see ``EngineConfig.record``.
    """

    def __init__(self, model: Decoder, batch: int, *, overlap: bool, record: Path | None = None) -> None:
        self.llm = LLM(
            model,
            page_size=PAGE_SIZE,
            max_running_requests=batch,
            chunked_prefill_size=batch,
            max_total_tokens=batch * CONTEXT // 2,
            overlap_steps=overlap,
            record=record,
        )
        params = SamplingParams(max_new_tokens=CONTEXT // 2 - PAGE_SIZE)
        for index in range(batch):
            self.llm.add_request([index % 256] * (1 + index % PAGE_SIZE), params)
        while not all(request.output for request in self.llm.scheduler.running) or self.llm.scheduler.waiting:
            self.llm.step()

    def measure(self, steps: int) -> tuple[dict[str, float], float, str, int]:
        """Runs steps one after the other.

        Returns:
            Median microseconds of each phase of the host; of the device; arrays moved per step; programs compiled.
        """
        llm = self.llm
        clock: dict[str, list[float]] = {name: [] for name in (*PARTS, "device", "whole")}
        compiles, runner, batcher = llm.compiles_after_warmup, llm._runner, llm._stepper._batcher
        dispatch = timed(clock["transfer, dispatch"], runner.step)

        def step_then_wait(*arguments: Any) -> Any:
            result = dispatch(*arguments)
            timed(clock["device"], result.tokens.block_until_ready)()
            return result

        with contextlib.ExitStack() as wrapped:
            for owner, name, call in (
                (llm.scheduler, "next_step", timed(clock["schedule"], llm.scheduler.next_step)),
                (batcher, "fill", timed(clock["fill"], batcher.fill)),
                (llm.scheduler, "commit", timed(clock["commit"], llm.scheduler.commit)),
                (runner, "step", step_then_wait),
            ):
                wrapped.enter_context(replaced(owner, name, call))
            for _ in range(steps):
                timed(clock["whole"], llm.step)()
        parts = {name: median(clock[name]) * 1e6 for name in PARTS}
        named = zip(*(clock[name] for name in (*PARTS, "device")), strict=True)
        rest = [whole - sum(own) for whole, own in zip(clock["whole"], named, strict=True)]
        parts["read, rest"] = median(rest) * 1e6
        return parts, median(clock["device"]) * 1e6, self._moved(20), llm.compiles_after_warmup - compiles

    def _moved(self, steps: int) -> str:
        """Per step, host arrays among the arguments of all programs, and device arrays that were read."""
        runner, sent, read, asarray = self.llm._runner, [0], [0], np.asarray

        def reading(array: Any, *args: Any, **kwargs: Any) -> Any:
            read[0] += isinstance(array, jax.Array)
            return asarray(array, *args, **kwargs)

        with contextlib.ExitStack() as wrapped:
            for owner, name, call in (
                (np, "asarray", reading),
                (runner, "_steps", {shape: _counting(call, sent) for shape, call in runner._steps.items()}),
                (runner, "_sample", _counting(runner._sample, sent)),
                (runner, "_update_rows", _counting(runner._update_rows, sent)),
            ):
                wrapped.enter_context(replaced(owner, name, call))
            for _ in range(steps):
                self.llm.step()
        return f"{sent[0] / steps:g}, {read[0] / steps:g}"

    def measure_plain_feed(self, steps: int) -> float:
        """Median microseconds of the rival."""
        seconds: list[float] = []
        feed = timed(seconds, self.feed_plainly)
        for _ in range(steps):
            feed()
        return median(seconds) * 1e6

    def feed_plainly(self) -> None:
        """The inputs of a step, gathered request by request and sent array by array; pages are allocated already."""
        llm = self.llm
        tokens, positions, params = [], [], []
        rows: list[int] = []
        for request in llm.scheduler.running:
            tokens.append(request.output[-1])
            positions.append(request.num_tokens - 1)
            rows.append(request.req_pool_idx or 0)
            params.append((request.params.temperature, request.params.top_p, request.params.top_k, request.seed))
        table = llm.cache.page_table.rows(rows)
        at = np.array(positions) - 1
        slots = table[np.arange(len(rows)), at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
        arrays = (tokens, positions, slots, at + 1, np.arange(len(rows) + 1), *zip(*params, strict=True))
        jax.block_until_ready([jax.device_put(np.array(array)) for array in (*arrays, table)])


def _compare(model: Decoder, batch: int, rounds: int) -> None:
    engines = {name: DecodingEngine(model, batch, overlap=name == "overlapped") for name in ("in turn", "overlapped")}
    calls = {name: engine.llm.step for name, engine in engines.items()}
    timings = time_in_turn(calls, rounds=rounds, calls=10)
    ratio = median_ratio(timings["in turn"], timings["overlapped"])
    whole = ", ".join(f"{name} {timing.median * 1e6:.0f}" for name, timing in timings.items())
    print(f"microseconds a whole step of {batch} sequences: {whole}; overlapped is {ratio:.2f} times as fast")


def _compare_groups(hidden: int, batches: list[int], rounds: int) -> None:
    """Host time of two groups over that of one; the device has two layers in both."""
    kinds = {"one group": (None, None), "two groups": (None, WINDOW)}
    for batch in batches:
        engines = {name: DecodingEngine(make_model(hidden, each), batch, overlap=False) for name, each in kinds.items()}
        _compare_host(engines, batch, rounds)


def _compare_recording(model: Decoder, batches: list[int], rounds: int) -> None:
    """Host time of an engine that records over that of one that does not."""
    with tempfile.TemporaryDirectory() as folder:
        for batch in batches:
            silent = DecodingEngine(model, batch, overlap=False)
            path = Path(folder) / str(batch)
            recorded = DecodingEngine(model, batch, overlap=False, record=path)
            _compare_host({"silent": silent, "recorded": recorded}, batch, rounds)
            recorder = recorded.llm.scheduler.recorder
            if recorder is not None:
                recorder.flush()
            print(f"{path.stat().st_size / max(recorded.llm.stats.steps, 1):.0f} bytes a step are recorded")


def _compare_host(engines: dict[str, DecodingEngine], batch: int, rounds: int) -> None:
    """Prints the host time of two engines, side by side, and how many times the first's the second's is."""
    host: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            host[name].append(sum(engine.measure(2 * PAGE_SIZE)[0].values()))
    ratio = median(two / one for one, two in zip(*host.values(), strict=True))
    each = ", ".join(f"{name} {median(times):.0f}" for name, times in host.items())
    print(f"host microseconds per step, {batch} sequences: {each}; {list(host)[1]} costs {ratio:.2f} times as much")


def _counting(program: Callable[..., Any] | None, sent: list[int]) -> Callable[..., Any]:
    """The same program; counts which of its arguments are host arrays."""

    def wrapper(*args: Any) -> Any:
        sent[0] += sum(not isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(args))
        return program(*args) if program else None

    return wrapper
