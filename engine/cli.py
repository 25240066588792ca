"""The commands people type: ``python -m engine generate | serve | launch | plan | train | trace``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engine.config import DTYPES, EVICTION_POLICIES, IMPLS, KV_DTYPES, EngineConfig, read_toml
from engine.distributed import launch
from engine.distributed.processes import INDEX, is_first, join_from, leave_at_once
from engine.errors import ConfigError, Interrupted, ProcessLost, RequestError
from engine.models import train
from engine.models.checkpoint import CONFIG_FILE, load_config
from engine.models.default_model import DEFAULT_MODEL_DIR
from engine.models.model_config import ModelConfig
from engine.planning.units import format_bytes
from engine.server.server_options import MAX_PORT, add_server_options, options_from
from engine.serving.build import plan_pool
from engine.serving.check import check_against_dense
from engine.serving.llm import LLM
from engine.serving.loading import describe_dtype
from engine.serving.request import RequestOutput
from engine.serving.sampling_params import SamplingParams
from engine.serving.watch.exporter import serve_metrics
from engine.terminal import FAILED, INTERRUPTED, keep_stdout_for_answers, plain_console, run_command
from engine.trace import trace_commands
from engine.version import NAME, package_version

DEFAULT_PROMPT = "Alice was beginning to"
FAULTS = ("error", "non_finite")  # finish reasons of an answer that the engine could not complete
SERVE_PACKAGES = ("starlette", "uvicorn", "httptools", "pydantic", "jinja2", "prometheus_client")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code, as ``engine.terminal`` lists them."""
    args = _parser().parse_args(arguments)
    is_launched = INDEX in os.environ  # one of several processes
    if is_launched:
        keep_stdout_for_answers()
    code = run_command(lambda: _run(args))
    if code == INTERRUPTED and is_launched:
        launch.end_the_others()
    return code


def _run(args: argparse.Namespace) -> int:
    try:
        return int(args.run(args) or 0)
    except ProcessLost as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return leave_at_once(launch.FAILED)


def _parser() -> argparse.ArgumentParser:
    name = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(prog=name if name == NAME else "python -m engine", description=__doc__)
    versions = f"{NAME} {package_version()}, jax {version('jax')}, Python {platform.python_version()}"
    parser.add_argument("--version", action="version", version=versions)
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="answer prompts")
    add_engine_options(generate)
    _add_sampling_options(generate)
    generate.add_argument("--metrics-port", type=int, metavar="N", help="serve Prometheus metrics here while it runs")
    generate.add_argument("--metrics-address", default="127.0.0.1", metavar="IP", help="address to listen on")
    generate.set_defaults(run=run_generate)
    serve = commands.add_parser("serve", help="answer requests over HTTP, as clients of OpenAI's API send them")
    add_server_options(serve)
    add_engine_options(serve)
    serve.set_defaults(run=run_serve)
    plan = commands.add_parser("plan", help="print the size of a configuration's pool, without loading weights")
    plan.add_argument(
        "config", type=Path, nargs="+", help="TOML files with [model] and [engine] tables, or checkpoint directories"
    )
    plan.add_argument("--platform", choices=("cpu", "gpu", "tpu"), default="tpu", help="whose padding the pool has")
    plan.add_argument("--kv-cache-dtype", choices=KV_DTYPES, help="dtype of the pool, instead of the configuration's")
    plan.set_defaults(run=run_plan)
    several = commands.add_parser("launch", help="run a command in several processes on this machine")
    launch.add_arguments(several)
    several.set_defaults(run=launch.run)
    training = commands.add_parser("train", help="train the small Llama that ships with the package")
    train.add_arguments(training)
    training.set_defaults(run=train.run)
    traces = commands.add_parser("trace", help="play, shrink, count or show what --record has written")
    trace_commands.add_arguments(traces)
    return parser


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Declares a flag for each field of EngineConfig, whose default is that of the file of ``--config``, or none."""
    group = parser.add_argument_group("engine", "defaults come from --config, else from the engine")
    group.add_argument("--config", type=Path, help="TOML file whose [engine] table gives the defaults")
    group.add_argument("--model", help="checkpoint directory in the Hugging Face layout; default: the Llama that ships")
    group.add_argument("--dtype", choices=("auto", *DTYPES), help="dtype of weights and activations")
    group.add_argument(
        "--no-parse-special-tokens",
        dest="parse_special_tokens",
        action="store_false",
        default=None,
        help="treat a special token's name in a prompt as plain text",
    )
    group.add_argument("--kv-cache-dtype", choices=("auto", *KV_DTYPES), help="dtype of the pool")
    group.add_argument("--page-size", type=int, metavar="N", help="tokens per page, 1 to 256")
    group.add_argument("--max-total-tokens", type=int, metavar="N", help="token slots in the pool")
    group.add_argument("--mem-fraction-static", type=float, metavar="F", help="device memory for weights and pool")
    group.add_argument("--max-running-requests", type=int, metavar="N", help="most requests that run at once")
    group.add_argument("--chunked-prefill-size", type=int, metavar="N", help="most new tokens in a step")
    group.add_argument(
        "--no-overlap-steps",
        dest="overlap_steps",
        action="store_false",
        default=None,
        help="commit each step before the next one is planned",
    )
    group.add_argument("--context-length", type=int, metavar="N", help="most tokens of prompt and answer")
    group.add_argument("--attention-impl", choices=IMPLS)
    group.add_argument("--tp", type=int, metavar="N", help="devices that divide heads and weights among them")
    group.add_argument("--dp", type=int, metavar="N", help="replicas of attention")
    group.add_argument("--cp", type=int, metavar="N", help="devices that divide the tokens of each page")
    group.add_argument("--disable-radix-cache", action="store_true", default=None, help="keep nothing of past requests")
    group.add_argument("--eviction-policy", choices=EVICTION_POLICIES, help="which cached prefixes are evicted first")
    group.add_argument("--host-tier-bytes", type=int, metavar="N", help="host memory for evicted pages")
    group.add_argument("--prefix-cache-dir", metavar="DIR", help="load cached prefixes from here, save them at the end")
    group.add_argument("--record", metavar="FILE", help="write every decision about pages here; see trace")


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    defaults = SamplingParams()
    group = parser.add_argument_group("request")
    group.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given several times; token ids separated by blanks where the model has no tokenizer",
    )
    group.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, metavar="N")
    group.add_argument("--temperature", type=float, default=defaults.temperature, help="0 is greedy")
    group.add_argument("--top-k", type=int, default=defaults.top_k, help="0 keeps all")
    group.add_argument("--top-p", type=float, default=defaults.top_p, help="1 keeps all")
    group.add_argument("--min-p", type=float, default=defaults.min_p, help="0 keeps all")
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        default = getattr(defaults, name)
        group.add_argument(
            f"--{name.replace('_', '-')}", type=float, default=default, metavar="F", help=f"{default:g} changes nothing"
        )
    group.add_argument(
        "--logit-bias",
        action="append",
        type=_bias,
        default=[],
        metavar="ID=F",
        help="added to the logit of a token; may be given several times",
    )
    group.add_argument("--min-tokens", type=int, default=defaults.min_tokens, metavar="N", help="least new tokens")
    group.add_argument("--seed", type=int, default=defaults.seed)
    group.add_argument("--ignore-eos", action="store_true")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a text that ends an answer")
    group.add_argument(
        "--check",
        action="store_true",
        help="recompute every generated token with dense attention over unfused K and V, and compare",
    )


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no bias; give a token id and a number, such as 42=-1.5"
        ) from error


def run_generate(args: argparse.Namespace) -> int:
    """``generate``: prints the answers, and on stderr the pool's size, the progress and the statistics of the run."""
    join_from(os.environ)
    params = SamplingParams(
        **{f.name: getattr(args, f.name) for f in fields(SamplingParams) if hasattr(args, f.name)},
    )
    options = _engine_options(args)
    _check_metrics(args)
    prompts = partial(_prompts, args.prompt or [DEFAULT_PROMPT])
    with _progress("loading the model", "compiling") as advance:
        llm = LLM(
            **options,
            on_compile=advance,
            before_compile=lambda engine: engine.check_requests(prompts(engine), params),
        )
    _tell(describe_dtype(llm.config, llm.model))
    _tell(llm.plan.describe())
    was_interrupted = False
    try:
        with _metrics(args, llm), _progress("generating", "generating") as advance:
            outputs = llm.generate(prompts(llm), params, return_logits=args.check, on_progress=advance)
    except Interrupted as interrupt:
        outputs, was_interrupted = interrupt.outputs, True
    compiles = llm.compiles_after_warmup
    for number, output in enumerate(outputs):
        _print_output(number, output, text=llm.tokenizer is not None)
    if was_interrupted:
        _tell("interrupted: these are the answers so far")
        return INTERRUPTED
    if llm.config.prefix_cache_dir:
        llm.save_prefix_cache()
    _print_stats(llm, outputs, compiles)
    failed = any(output.finish_reason in FAULTS for output in outputs)
    return max(_print_check(llm, outputs) if args.check else 0, FAILED if failed else 0)


def run_serve(args: argparse.Namespace) -> int:
    """``serve``: answers requests over HTTP until it is stopped."""
    if INDEX in os.environ:
        raise ConfigError("serve runs in one process, which drives all of its devices; start it without launch")
    if missing := [name for name in SERVE_PACKAGES if find_spec(name) is None]:
        raise ConfigError(f"serve needs {', '.join(missing)}; install this package with [serve]")
    from engine.server.http_server import serve  # here, since only this command needs the packages of that extra
    from engine.server.service import prepare

    server_options, engine_options = options_from(args, os.environ), _engine_options(args)
    prepared = prepare(server_options, engine_options.get("model"))
    with server_options.bind(has_keys=bool(prepared.keys)) as bound:  # before a model is loaded for nothing
        with _progress("loading the model", "compiling") as advance:
            llm = LLM(**engine_options, on_compile=advance)
        _tell(describe_dtype(llm.config, llm.model))
        _tell(llm.plan.describe())
        code = serve(llm, prepared, bound, on_ready=_tell)
    if llm.config.prefix_cache_dir:
        llm.save_prefix_cache()
    return code


def run_plan(args: argparse.Namespace) -> int:
    """``plan``: prints the size of each configuration's pool, by the formula that the pool itself uses."""
    for path in args.config:
        engine, model = _planned(path)
        engine = replace(engine, kv_cache_dtype=args.kv_cache_dtype or engine.kv_cache_dtype)
        dtype = next((name for name in (engine.kv_cache_dtype, engine.dtype) if name != "auto"), "bfloat16")
        plan = plan_pool(engine, model, dtype, platform=args.platform)
        print(f"{path}: {format_bytes(plan.model_token_bytes)} per token ({dtype}). {plan.describe()}")
    return 0


def _planned(path: Path) -> tuple[EngineConfig, ModelConfig]:
    """The engine and model of a configuration file, or of a checkpoint directory with the engine's defaults."""
    if path.is_dir() or path.name == CONFIG_FILE:
        return EngineConfig(), load_config(path if path.is_dir() else path.parent)
    tables = read_toml(path)
    if "model" not in tables:
        raise ConfigError(f"{path} has no [model] table, so there is no geometry to plan for; add one")
    try:
        return EngineConfig.from_mapping(tables.get("engine", {})), ModelConfig.from_mapping(tables["model"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _engine_options(args: argparse.Namespace) -> dict[str, Any]:
    tables = read_toml(args.config) if args.config else {}
    options = dict(tables.get("engine", {}))
    for field in fields(EngineConfig):
        if getattr(args, field.name, None) is not None:
            options[field.name] = getattr(args, field.name)
    config = EngineConfig.from_mapping(options)
    if "model" in tables:
        _require_same_model(ModelConfig.from_mapping(tables["model"]), config, args.config)
    return options


def _require_same_model(described: ModelConfig, config: EngineConfig, path: Path) -> None:
    """Refuses a ``[model]`` table that does not describe the model to be loaded, since it would be ignored."""
    directory = Path(DEFAULT_MODEL_DIR if config.model is None else config.model)
    loaded = load_config(directory)
    names = [field.name for field in fields(ModelConfig) if not field.name.endswith("_token_id")]
    if wrong := [name for name in names if getattr(described, name) != getattr(loaded, name)]:
        which = f"the one in {directory}" if config.model is not None else "the small Llama that ships (no --model)"
        raise ConfigError(
            f"the [model] table of {path} does not describe the model to be loaded, {which}: {', '.join(wrong)} "
            "differ; give the checkpoint that it describes by --model, or leave the table out"
        )


def _check_metrics(args: argparse.Namespace) -> None:
    """Raises ConfigError for wrong metrics options before anything is compiled."""
    if args.metrics_port is None:
        return
    if not 0 <= args.metrics_port <= MAX_PORT:
        raise ConfigError(f"--metrics-port {args.metrics_port} must be from 0 (any that is free) to {MAX_PORT}")
    if find_spec("prometheus_client") is None:
        raise ConfigError("--metrics-port needs prometheus-client; install it, or this package with [metrics]")


@contextmanager
def _metrics(args: argparse.Namespace, llm: LLM) -> Iterator[None]:
    if args.metrics_port is None:
        yield
    else:
        with serve_metrics(llm.metrics, args.metrics_port, args.metrics_address) as port:
            _tell(f"metrics: http://{args.metrics_address}:{port}/metrics")
            yield


def _tell(line: str) -> None:
    """Prints on stderr, in process 0, a line that is not an answer."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


def _prompts(texts: list[str], llm: LLM) -> list[str] | list[list[int]]:
    if llm.tokenizer is not None:
        return texts
    try:
        return [[int(word) for word in text.split()] for text in texts]
    except ValueError as error:
        raise RequestError(f"the model has no tokenizer.json, so prompts must be token ids: {error}") from error


@contextmanager
def _progress(before: str, what: str) -> Iterator[Any]:
    """A progress bar on stderr: shows ``before``, without a count, until the yielded function is first called."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"), TimeElapsedColumn())
    with Progress(*columns, console=plain_console(stderr=True), disable=not is_first()) as bar:
        task = bar.add_task(before, total=None, done="")
        try:
            yield lambda done, total: bar.update(
                task, description=what, completed=done, total=total, done=f"{done}/{total}"
            )
        except BaseException:
            bar.live.transient = True  # the line printed next says why
            bar.console.quiet = not bar.console.is_terminal
            raise


def _print_output(number: int, output: RequestOutput, *, text: bool) -> None:
    _tell(f"\n[{number}] {len(output.prompt_token_ids)} prompt tokens, ended by {output.finish_reason}:")
    print(output.text if text else " ".join(map(str, output.token_ids)), flush=True)
    if output.error:
        _tell(f"[{number}] {output.error}")


def _print_stats(llm: LLM, outputs: list[RequestOutput], compiles: int) -> None:
    stats = llm.stats
    cached = sum(output.cached_tokens for output in outputs)
    share = stats.peak_held_tokens / llm.plan.size_tokens
    rows = {
        "prefill": _rate(stats.prefill_tokens, stats.prefill_seconds),
        "decode": _rate(stats.decode_tokens, stats.decode_seconds),
        "cached": f"{cached:,} prompt tokens found in the prefix cache",
        "peak pool use": f"{stats.peak_held_tokens:,} of {llm.plan.size_tokens:,} tokens ({share:.1%})",
        "memory": llm.metrics().describe(),
        "compiled": f"{llm.programs} programs ahead, {compiles} after",
    }
    _tell("\n" + "\n".join(f"{name:<15}{value}" for name, value in rows.items()))


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds if seconds else 0:,.0f} tokens/s ({tokens:,} tokens in {seconds:.2f} s)"


def _print_check(llm: LLM, outputs: list[RequestOutput]) -> int:
    check = check_against_dense(llm.model, outputs, kv_dtype=llm.pool.dtype)
    _tell(f"check against dense attention over unfused K and V: {check.describe()}")
    return int(not check.passed)
