"""``python -m engine launch``: runs one command in several processes on this machine, and ends all where one fails."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from engine.distributed.processes import COORDINATOR, COUNT, INDEX
from engine.errors import ConfigError
from engine.terminal import INTERRUPTED, count

LOOPBACK = "127.0.0.1"  # where process 0 listens for the others, and nowhere else
POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0  # for processes to end by themselves before they are killed
FAILED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--processes", type=count, required=True, metavar="N", help="how many, at least 1")
    parser.add_argument(
        "--virtual-devices",
        type=count,
        metavar="N",
        help="CPU devices per process; default: what XLA_FLAGS says, else 1",
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="a command of this program")


def run(args: argparse.Namespace) -> int:
    """Starts the processes, passes on what process 0 prints, and waits; returns the exit code.

    Where one process fails, the others are stopped within ``GRACE_SECONDS``, and a message names the one that failed.
    Ctrl-C is passed on to process 0, which prints the answers so far; then all processes are stopped, as on SIGTERM and
    SIGHUP.

    Raises:
        ConfigError: there is no command to run.
    """
    words = [word for index, word in enumerate(args.words) if index or word != "--"]
    if not words or words[0] == "launch":
        raise ConfigError("launch needs a command of this program after --, e.g. launch --processes 2 -- generate")
    address = f"{LOOPBACK}:{_free_port()}"
    children: list[subprocess.Popen[bytes]] = []
    with _signals_that_end():
        try:
            for index in range(args.processes):
                group = children[0].pid if children else 0
                children.append(_start(words, index, args.processes, address, args.virtual_devices, group))
            return _wait(children)
        except KeyboardInterrupt:
            if _let_first_speak(children):
                return INTERRUPTED
            raise
        finally:
            _stop(children)


@contextlib.contextmanager
def _signals_that_end() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into an exception, so that no child is left behind."""

    def end(signum: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + signum)

    before = {each: signal.signal(each, end) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _let_first_speak(children: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Interrupts process 0 alone, which needs the others to reach the end of its step; returns whether it ended so."""
    if not children or children[0].poll() is not None:
        return False
    children[0].send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        children[0].wait(GRACE_SECONDS)
    return children[0].returncode == INTERRUPTED


def _start(
    words: Sequence[str], index: int, count: int, address: str, virtual_devices: int | None, group: int
) -> subprocess.Popen[bytes]:
    environment = os.environ | {COORDINATOR: address, COUNT: str(count), INDEX: str(index)}
    if virtual_devices:
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={virtual_devices}"
    output = None if index == 0 else subprocess.DEVNULL
    # The children have their own process group: a terminal's Ctrl-C reaches the launcher alone, which passes it on.
    command = [sys.executable, "-m", "engine", *words]
    return subprocess.Popen(command, env=environment, stdout=output, process_group=group)


def end_the_others() -> None:
    """Stops the other processes from process 0, which Ctrl-C has ended, before they report that they lost it."""
    if os.getpgrp() == os.getpid():  # as ``launch`` starts it; else the group has foreign processes too
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        time.sleep(POLL_SECONDS)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until all are done or one has failed; returns the exit code."""
    while True:
        codes = [child.poll() for child in children]
        failed = [index for index, code in enumerate(codes) if code]
        if failed:
            # A process that was killed comes before those that failed because of it.
            first = min(failed, key=lambda index: ((codes[index] or 0) > 0, index))
            code = codes[first] or FAILED
            running = sum(code is None for code in codes)
            print(
                f"process {first} of {len(children)} {_how_it_ended(code)}; stopping the {running} that still run",
                file=sys.stderr,
                flush=True,
            )
            return code if code > 0 else FAILED
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_SECONDS)


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends the processes that still run: by SIGTERM, then by SIGKILL."""
    running = [child for child in children if child.poll() is None]
    for child in running:
        child.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for child in running:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
