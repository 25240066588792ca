"""``python -m engine trace``: plays, shrinks, counts and shows what ``--record`` has written."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.errors import ConfigError
from engine.terminal import FAILED
from engine.trace.page_history import PageHistory
from engine.trace.page_html import trace_page
from engine.trace.replay import replay
from engine.trace.shrink import shrink
from engine.trace.trace_file import read_trace, write_trace
from engine.trace.trace_stats import count_trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the commands of a trace."""
    commands = parser.add_subparsers(dest="trace_command", required=True)
    for name, run, text in (
        ("replay", run_replay, "play a trace on fresh books and check them after every step"),
        ("shrink", run_shrink, "make a failing trace small"),
        ("stats", run_stats, "count what is in a trace"),
        ("view", run_view, "write a page of HTML that shows every page of the pool at every step"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("trace", type=Path, help="file that --record has written")
        command.set_defaults(run=run)
        if name in ("shrink", "view"):
            command.add_argument("-o", "--output", type=Path, required=True, help="file that is written")
        if name == "view":
            command.add_argument("--first", type=int, default=0, metavar="STEP", help="first step that is shown")
            command.add_argument("--last", type=int, metavar="STEP", help="last step that is shown")


def run_replay(args: argparse.Namespace) -> int:
    """``trace replay``: 0 where every decision comes out again and all books are sound, else 1."""
    result = replay(read_trace(args.trace).events)
    print(f"{result.events:,} events in {result.steps:,} steps played")
    if not result.is_exact:
        print(f"a fault broke off a call: what followed was not compared, and {result.skipped:,} calls were left out")
    if result.failure is None:
        print("the books were sound after every step" + (", and every decision came out again" * result.is_exact))
        return 0
    print(result.failure.describe())
    return FAILED


def run_shrink(args: argparse.Namespace) -> int:
    """``trace shrink``: writes the fewest events that still fail in the same way."""
    small = shrink(read_trace(args.trace).events)
    write_trace(args.output, small.lines)
    print(small.failure.describe())
    print(f"{args.output}: {small.events:,} of {small.before:,} events fail alike")
    return 0


def run_stats(args: argparse.Namespace) -> int:
    """``trace stats``: prints figures."""
    print(count_trace(read_trace(args.trace).events).describe())
    return 0


def run_view(args: argparse.Namespace) -> int:
    """``trace view``: writes the page; 1 where the trace fails, whose steps before that are shown."""
    trace = read_trace(args.trace)
    history = PageHistory.of(trace, first=args.first, last=args.last)
    page = trace_page(history, str(trace.header.get("started", "")))
    try:
        args.output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {args.output}: {error.strerror}; check the path") from error
    print(f"{args.output}: {len(history.steps):,} moments, {len(page) / 2**20:.1f} MiB")
    if history.failure is None:
        return 0
    print(history.failure.describe())
    return FAILED
