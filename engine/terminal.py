"""How every command behaves at a terminal: answers go to stdout, all else to stderr, and an error is one line.

Exit codes: 0 done; 1 a check or a request failed, or the machine refused; 2 the caller's mistake; 130 Ctrl-C; 141 the
reader of the output has closed the pipe.
"""

from __future__ import annotations

import argparse
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Timer
from types import FrameType
from typing import TYPE_CHECKING

from engine.devices import why_no_device
from engine.errors import EngineError

if TYPE_CHECKING:
    from rich.console import Console

AGAIN_SECONDS = 0.05
OUTPUTS = (1, 2)  # descriptors of stdout and stderr
FAILED, MISTAKE, INTERRUPTED, UNREAD = 1, 2, 130, 141


def run_command(command: Callable[[], int | None]) -> int:
    """Runs a command and returns the process's exit code; what ends it early is printed in one line on stderr.

    ``command`` returns its exit code, or None for 0. A bug still shows its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a model may generate what the terminal cannot write
    try:
        with _no_interrupt_lost():
            code = command() or 0
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return tell_end("interrupted", INTERRUPTED)
    except EngineError as error:
        return tell_end(f"{type(error).__name__}: {error}", MISTAKE)
    except BrokenPipeError as error:
        return UNREAD if _is_unread() else tell_end(f"{type(error).__name__}: {error}", FAILED)
    except (OSError, MemoryError) as error:
        _forget_output()
        return tell_end(f"{type(error).__name__}: {error}", FAILED)
    except (RuntimeError, AssertionError) as error:  # raised by jax without a device, or without memory on it
        if "jax" in sys.modules and (reason := why_no_device()):
            return tell_end(f"ConfigError: {reason}", MISTAKE)
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return tell_end(
            f"out of memory: {str(error).splitlines()[0]}; lower max_running_requests or chunked_prefill_size", FAILED
        )


@contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Raises Ctrl-C again where Python raised it in code that cannot raise: a finalizer or a garbage-collector hook."""
    report = sys.unraisablehook

    def again(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Later, since here it would be lost again.
            Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            report(unraisable)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = report


@contextmanager
def loading() -> Iterator[None]:
    """Encloses the imports of a command: Ctrl-C ends the process at once, since nothing needs cleaning up yet.

    As an exception it would be raised in the middle of a library's import, which may swallow it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:  # e.g. ignored, in a background process
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def leave(code: int) -> None:
    """Ends the process with an exit code; after Ctrl-C at once, since an interrupted compile may still run."""
    if code == INTERRUPTED:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # the pipe or the stream is closed
                stream.flush()
        os._exit(code)
    raise SystemExit(code)


def keep_stdout_for_answers() -> None:
    """Keeps stdout for what Python prints: what native libraries print to stdout goes to stderr."""
    if sys.stdout is not None:
        sys.stdout.flush()
        answers = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = os.fdopen(answers, "w", encoding=sys.stdout.encoding, errors="backslashreplace")


def tell_end(line: str, code: int) -> int:
    """Prints on stderr, in one line, what ended the command, and returns its exit code."""
    print(line, file=sys.stderr, flush=True)
    return code


def plain_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that prints text as it is: ``[red]`` and ``:key:`` are not markup."""
    from rich.console import Console  # here, because Ctrl-C must work before it is loaded

    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False, soft_wrap=width is None)


def at_least(least: int) -> Callable[[str], int]:
    """A ``type`` for argparse: a whole number of at least ``least``."""

    def whole_number(text: str) -> int:
        with suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number at least {least}")

    return whole_number


def positive(text: str) -> float:
    """A ``type`` for argparse: a finite number above 0."""
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")


count = at_least(1)


def _is_unread() -> bool:
    """Whether this process's own output has met a closed pipe; if so, the rest of the output is discarded."""
    poll = select.poll()
    for descriptor in OUTPUTS:
        poll.register(descriptor, 0)
    unread = any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    if unread:
        _forget_output()
    return unread


def _forget_output() -> None:
    """Discards output that stdout cannot write, or Python would complain again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):
        os.dup2(nowhere, OUTPUTS[0])
    os.close(nowhere)


def _leave(signum: int, frame: FrameType | None) -> None:
    os.write(OUTPUTS[1], b"interrupted\n")
    os._exit(INTERRUPTED)
