"""The commands people type: ``python -m engine generate | launch | plan | train``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from engine import launch
from engine.config import DTYPES, EVICTION_POLICIES, IMPLS, EngineConfig, read_toml
from engine.errors import ConfigError, EngineError, ProcessLost, RequestError
from engine.models import train
from engine.models.llama_config import LlamaConfig
from engine.planning.sizing import format_bytes
from engine.processes import is_first, join_from, leave_at_once
from engine.serving.build import plan_pool
from engine.serving.check import check_against_dense
from engine.serving.exporter import serve_metrics
from engine.serving.llm import LLM
from engine.serving.request import RequestOutput, SamplingParams

DEFAULT_PROMPT = "Alice was beginning to"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code: 0 done, 1 a check failed, 2 the caller's mistake."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args) or 0)
    except ProcessLost as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return leave_at_once(launch.FAILED)
    except EngineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="answer prompts")
    _add_engine_options(generate)
    _add_sampling_options(generate)
    generate.add_argument("--metrics-port", type=int, metavar="N", help="serve Prometheus metrics here while it runs")
    generate.add_argument("--metrics-address", default="127.0.0.1", metavar="IP", help="of this machine to listen on")
    generate.set_defaults(run=run_generate)
    plan = commands.add_parser("plan", help="say what a configuration's pool takes and holds, without loading weights")
    plan.add_argument("config", type=Path, nargs="+", help="TOML files with [model] and [engine] tables")
    plan.add_argument("--platform", choices=("cpu", "gpu", "tpu"), default="tpu", help="whose padding to count")
    plan.set_defaults(run=run_plan)
    several = commands.add_parser("launch", help="run a command in several processes on this machine")
    launch.add_arguments(several)
    several.set_defaults(run=launch.run)
    training = commands.add_parser("train", help="train the small Llama that ships with the package")
    train.add_arguments(training)
    training.set_defaults(run=train.run)
    return parser


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine", "defaults come from --config, else from the engine")
    group.add_argument("--config", type=Path, help="TOML file whose [engine] table gives the defaults")
    group.add_argument("--model", help="checkpoint directory in the Hugging Face layout; default: the Llama that ships")
    group.add_argument("--dtype", choices=("auto", *DTYPES), help="of weights and activations")
    group.add_argument("--kv-cache-dtype", choices=("auto", *DTYPES), help="of the pool")
    group.add_argument("--page-size", type=int, metavar="N", help="tokens a page, 1 to 256")
    group.add_argument("--max-total-tokens", type=int, metavar="N", help="token slots in the pool")
    group.add_argument("--mem-fraction-static", type=float, metavar="F", help="device memory for weights and pool")
    group.add_argument("--max-running-requests", type=int, metavar="N", help="slots of the batch")
    group.add_argument("--chunked-prefill-size", type=int, metavar="N", help="most new tokens a step")
    group.add_argument(
        "--no-overlap-steps",
        dest="overlap_steps",
        action="store_false",
        default=None,
        help="commit each step before the next is planned",
    )
    group.add_argument("--context-length", type=int, metavar="N", help="most tokens of prompt and answer")
    group.add_argument("--attention-impl", choices=IMPLS)
    group.add_argument("--tp", type=int, metavar="N", help="devices that share the heads and the weights")
    group.add_argument("--dp", type=int, metavar="N", help="replicas of attention")
    group.add_argument("--cp", type=int, metavar="N", help="devices that share the tokens of each page")
    group.add_argument("--disable-radix-cache", action="store_true", default=None, help="keep nothing of past requests")
    group.add_argument("--eviction-policy", choices=EVICTION_POLICIES, help="what the prefix cache gives up first")
    group.add_argument("--host-tier-bytes", type=int, metavar="N", help="host memory for pages that are given up")
    group.add_argument("--prefix-cache-dir", metavar="DIR", help="load cached prefixes from here, save them at the end")


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    defaults = SamplingParams()
    group = parser.add_argument_group("request")
    group.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given many times; token ids separated by blanks where the model has no tokenizer",
    )
    group.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, metavar="N")
    group.add_argument("--temperature", type=float, default=defaults.temperature, help="0 is greedy")
    group.add_argument("--top-k", type=int, default=defaults.top_k, help="0 keeps all")
    group.add_argument("--top-p", type=float, default=defaults.top_p)
    group.add_argument("--seed", type=int, default=defaults.seed)
    group.add_argument("--ignore-eos", action="store_true")
    group.add_argument(
        "--check",
        action="store_true",
        help="recompute every generated token with dense attention over unfused K and V, and compare",
    )


def run_generate(args: argparse.Namespace) -> int:
    """``generate``: prints what the pool holds, the answers, and what the run cost."""
    console = Console(highlight=False, soft_wrap=True)
    join_from(os.environ)
    params = SamplingParams(
        **{f.name: getattr(args, f.name) for f in fields(SamplingParams) if hasattr(args, f.name)},
    )
    with _progress("compiling") as advance:
        llm = LLM(**_engine_options(args), on_compile=advance)
    console.print(llm.plan.describe())
    prompts = _prompts(args.prompt or [DEFAULT_PROMPT], llm)
    with _metrics(args, llm, console), _progress("generating") as advance:
        outputs = llm.generate(prompts, params, return_logits=args.check, on_progress=advance)
    compiles = llm.compiles_after_warmup
    if llm.config.prefix_cache_dir:
        llm.save_prefix_cache()
    for number, output in enumerate(outputs):
        _print_output(console, number, output, text=llm.tokenizer is not None)
    _print_stats(console, llm, outputs, compiles)
    return _print_check(console, llm, outputs) if args.check else 0


def run_plan(args: argparse.Namespace) -> int:
    """``plan``: what each configuration's pool takes, from the formula that the pool itself uses."""
    console = Console(highlight=False, soft_wrap=True)
    for path in args.config:
        tables = read_toml(path)
        engine = EngineConfig.from_mapping(tables.get("engine", {}))
        if "model" not in tables:
            raise ConfigError(f"{path} has no [model] table, so there is no geometry to plan for; add one")
        model = LlamaConfig.from_mapping(tables["model"])
        dtype = next((name for name in (engine.kv_cache_dtype, engine.dtype) if name != "auto"), "bfloat16")
        plan = plan_pool(engine, model, dtype, platform=args.platform)
        console.print(f"{path}: {format_bytes(plan.token_bytes * plan.layers)} a token ({dtype}). {plan.describe()}")
    return 0


def _engine_options(args: argparse.Namespace) -> dict[str, Any]:
    options = dict(read_toml(args.config).get("engine", {})) if args.config else {}
    for field in fields(EngineConfig):
        if getattr(args, field.name, None) is not None:
            options[field.name] = getattr(args, field.name)
    return options


@contextmanager
def _metrics(args: argparse.Namespace, llm: LLM, console: Console) -> Iterator[None]:
    if args.metrics_port is None:
        yield
    else:
        with serve_metrics(llm.metrics, args.metrics_port, args.metrics_address) as port:
            console.print(f"metrics: http://{args.metrics_address}:{port}/metrics")
            yield


def _prompts(texts: list[str], llm: LLM) -> list[str] | list[list[int]]:
    if llm.tokenizer is not None:
        return texts
    try:
        return [[int(word) for word in text.split()] for text in texts]
    except ValueError as error:
        raise RequestError(f"the model has no tokenizer.json, so prompts must be token ids: {error}") from error


@contextmanager
def _progress(what: str) -> Iterator[Any]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not is_first()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_output(console: Console, number: int, output: RequestOutput, *, text: bool) -> None:
    answer = output.text if text else " ".join(map(str, output.token_ids))
    console.print(
        f"\n[{number}] {len(output.prompt_token_ids)} prompt tokens, ended by {output.finish_reason}:", markup=False
    )
    console.print(answer, markup=False)


def _print_stats(console: Console, llm: LLM, outputs: list[RequestOutput], compiles: int) -> None:
    stats = llm.stats
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("prefill", _rate(stats.prefill_tokens, stats.prefill_seconds))
    table.add_row("decode", _rate(stats.decode_tokens, stats.decode_seconds))
    cached = sum(output.cached_tokens for output in outputs)
    table.add_row("cached", f"{cached:,} prompt tokens found in the prefix cache")
    share = stats.peak_held_tokens / llm.plan.size_tokens
    table.add_row("peak pool use", f"{stats.peak_held_tokens:,} of {llm.plan.size_tokens:,} tokens ({share:.1%})")
    table.add_row("memory", llm.metrics().describe())
    table.add_row("compiled", f"{llm.programs} programs ahead, {compiles} after")
    console.print()
    console.print(table)


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds if seconds else 0:,.0f} tokens/s ({tokens:,} tokens in {seconds:.2f} s)"


def _print_check(console: Console, llm: LLM, outputs: list[RequestOutput]) -> int:
    check = check_against_dense(llm.model, outputs, kv_dtype=llm.pool.dtype)
    verdict = "ok" if check.passed else "FAILED"
    console.print(
        f"check against dense attention over unfused K and V: {check.tokens} tokens, largest logit difference "
        f"{check.largest_difference:.2e} (bound {check.bound:.0e}), {check.argmax_differs} with another best token: "
        f"{verdict}"
    )
    return int(not check.passed)
