"""A server of this package in a process of its own: starting it, its figures, its memory and descriptors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from engine.errors import EngineError

READY = re.compile(r" at (http://\S+)/v1")
START_SECONDS, STOP_SECONDS = 300.0, 60.0


@dataclass(frozen=True)
class ServerProcess:
    """A running server.

    Attributes:
        host, port: where it listens.
        pid: its process.
    """

    host: str
    port: int
    pid: int

    def figures(self) -> dict[str, float]:
        """Its metrics by name and labels, as the exposition format writes them."""
        with urllib.request.urlopen(f"http://{self.host}:{self.port}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def held_pages(self) -> int:
        """Pages that requests hold."""
        figures = self.figures()
        return int(sum(figures[f'engine_kv_pages{{state="{state}"}}'] for state in ("held", "cached_locked")))

    def resident_bytes(self) -> int:
        """Memory that the process has now."""
        with open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        """Files and sockets that it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextmanager
def running_server(flags: Sequence[str]) -> Iterator[ServerProcess]:
    """Serves the model that ships on a free port while the context lasts, and stops as by Ctrl-C in a terminal.

    Raises:
        EngineError: it does not start, or does not stop in ``STOP_SECONDS``.
    """
    command = [sys.executable, "-m", "engine", "serve", "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield _ready(process)
        process.terminate()
        if process.wait(STOP_SECONDS) != 0:
            raise EngineError(f"the server ended with exit code {process.returncode} when it was stopped")
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"the server did not stop within {STOP_SECONDS:.0f} seconds") from error
    finally:
        process.kill()
        process.wait()


def _ready(process: subprocess.Popen[str]) -> ServerProcess:
    """Waits for the line that names the address; what the server says later is dropped."""
    lines = process.stderr
    if lines is None:
        raise EngineError("the server's messages cannot be read")
    timer = threading.Timer(START_SECONDS, process.kill)
    timer.start()
    said = []
    for line in lines:
        said.append(line)
        if found := READY.search(line):
            timer.cancel()
            threading.Thread(target=_drain, args=(lines,), daemon=True).start()
            url = urlsplit(found[1])
            return ServerProcess(url.hostname or "", url.port or 0, process.pid)
    timer.cancel()
    raise EngineError(f"the server has not started: {''.join(said[-5:])}")


def _drain(lines: Iterator[str]) -> None:
    for _ in lines:
        pass
