"""All checks that need a GPU, in one command: correctness, device times, and torch for comparison.

Each section runs in a separate process, so that a kernel that never ends, or breaks the device, costs one task. Times
are device times, with scattered pages and caches that are not in L2. No setting of the device is changed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from engine.bench.gpu_device.report import Report
from engine.bench.gpu_device.sections import SECTIONS, Section
from engine.bench.gpu_device.supervisor import run_tasks
from engine.bench.gpu_device.tables import print_tables
from engine.errors import ConfigError
from engine.terminal import positive

MOST_TOLD = 300  # characters of an error that are printed; the file has all of it
NAMES = tuple(section.name for section in SECTIONS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--only", metavar="SECTION,…", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--budget", type=positive, default=420.0, help="seconds in total (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file, rewritten after every task")
    parser.add_argument("--impl", default="gpu", help="ours: gpu, xla, cpu or reference (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the command on a CPU")


def run(args: argparse.Namespace) -> int:
    """Runs the sections, prints each result when it arrives, and ends with tables.

    Returns:
        1 where a result was wrong, else 0.

    Raises:
        ConfigError: ``--only`` names an unknown section.
    """
    wanted = args.only.split(",") if args.only else list(NAMES)
    if unknown := set(wanted) - set(NAMES):
        raise ConfigError(f"--only names {', '.join(sorted(unknown))}; sections are {', '.join(NAMES)}")
    start = time.monotonic()
    report = Report(args.out)
    for section in SECTIONS:
        if section.name in wanted:
            print(f"== {section.name} at {time.monotonic() - start:.0f} s", flush=True)
            _run_section(section, report, args, deadline=start + args.budget)
    print(f"== done at {time.monotonic() - start:.0f} s of {args.budget:.0f} s\n")
    print_tables(report)
    return int(any(not result.get("ok", True) for _, result in report.results("correctness")))


def _run_section(section: Section, report: Report, args: argparse.Namespace, *, deadline: float) -> None:
    tasks = section.module.tasks(args.impl, small=args.small)

    def told(number: int, outcome: dict[str, Any]) -> None:
        entry = report.add(section.name, tasks[number], outcome)
        if "result" in entry:
            print(section.module.line(entry["task"], entry["result"]), flush=True)
        else:
            reason = f"ERROR {entry['error'][:MOST_TOLD]}" if "error" in entry else f"skipped: {entry['skipped']}"
            print(f"{reason}\n      {section.name} {number}: {_short(entry['task'])}", flush=True)

    run_tasks(section, tasks, told, min(deadline, time.monotonic() + section.limit))


def _short(task: dict[str, Any]) -> str:
    """A task in one line: its name if it has one."""
    return str(task["case"]["name"] if "case" in task else task)
