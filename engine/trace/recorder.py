"""Writes every decision of the control plane, in the order in which it was made.

A trace is lines of JSON: ``[what, replica, what it was asked, what came of it]``. The first says what the file is, and
``step`` begins a step: all that follows happened in it. Texts and token ids are never written: pages of tokens are
named by keyed digests (``page_digests``), scopes, models and tenants by numbers.

A trace begins with empty books, so that it can be played. It ends when it has ``MOST_BYTES``: what is there stays
playable, and a last line says that it was cut.
"""

from __future__ import annotations

import json
import logging
import os
import time
import weakref
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TextIO

from engine.errors import ConfigError
from engine.memory.integers import Int32
from engine.memory.manager import CacheManager
from engine.memory.pages import PageIds
from engine.memory.scope import CacheScope
from engine.trace.integer_lists import pack
from engine.trace.page_digests import PageDigests, Written
from engine.version import package_version

FORMAT, VERSION = "fused-kv-engine trace", 1
MOST_BYTES = 2**28
BUFFERED_LINES, BUFFERED_NANOSECONDS = 4096, 10**9

# Lines of which there are many are written out when the file is written.
_StepLine = tuple[int, int, int, list[int], list[int]]  # step, time, waiting requests, free and evictable pages
_GrowthLine = tuple[int, PageIds]
_Line = str | _StepLine | _GrowthLine

_logger = logging.getLogger(__name__)


class Recorder:
    """Writes a trace. What it cannot write it leaves out, and says so in the log: it never fails a call.

    One for all replicas of an engine, called by the thread that drives it.

    Args:
        file: where lines go; None keeps them for ``take_lines``.
        most_bytes: bytes after which the trace is cut.

    Attributes:
        books: the cache managers that it records, replica by replica.
        is_on: whether it writes; not any more once the trace was cut.
        steps: steps that have begun.
    """

    def __init__(self, file: TextIO | None = None, *, most_bytes: int = MOST_BYTES) -> None:
        self.books: list[CacheManager] = []
        self.steps = 0
        self._file, self._left, self._limit, self.is_on = file, most_bytes, most_bytes, True
        self._lines: list[_Line] = []
        self._digests: PageDigests | None = None
        self._names: dict[str, dict[Hashable, int]] = {}
        self._begun = self._flushed = time.perf_counter_ns()
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        header = {"format": FORMAT, "version": VERSION, "engine": package_version(), "started": started}
        self._lines.append(json.dumps(header))
        if file is not None:
            weakref.finalize(self, _close, file, self._lines, self._begun)

    @classmethod
    def to_path(cls, path: str | os.PathLike[str]) -> Recorder:
        """A recorder to a file, which only this user can read; it is made anew where there is one.

        Raises:
            ConfigError: the file cannot be written.
        """
        try:
            descriptor = os.open(Path(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot record to {path}: {error.strerror}; check the path") from error
        return cls(open(descriptor, "w", encoding="utf-8"))

    # What happens.

    def add_books(self, cache: CacheManager, settings: Mapping[str, Any]) -> int:
        """Notes empty books; returns the number of their replica."""
        self.books.append(cache)
        self._digests = self._digests or PageDigests(cache.page_size)
        index = len(self.books) - 1
        self.add("books", index, settings, {})
        return index

    def begin_step(self, waiting: int = 0) -> None:
        """Begins a step; what is recorded from now on belongs to it.

        Args:
            waiting: requests that wait for pages.
        """
        if not self.is_on:
            return
        self.steps += 1
        now = time.perf_counter_ns()
        free = [cache.allocator.pages.available for cache in self.books]
        evictable = [cache.prefix.evictable_pages for cache in self.books]
        self._lines.append((self.steps, now, waiting, free, evictable))
        if len(self._lines) >= BUFFERED_LINES or now - self._flushed > BUFFERED_NANOSECONDS:
            self.flush()

    def note_growth(self, replica: int, pages: PageIds) -> None:
        """Notes that the rows of the last growth have grown by one token each, and the pages taken for that."""
        if self.is_on:
            self._lines.append((replica, pages.copy()))

    def note_run(self, replica: int, request_id: int, row: int, scope: CacheScope) -> None:
        """Notes which request has got a row."""
        if self.is_on:
            self.add("run", replica, {"request": request_id, "row": row, "scope": self.scope(scope)}, {})

    def note_request(self, what: str, replica: int, request_id: int, reason: str | None = None) -> None:
        """Notes that a request was retracted (``retract``) or has ended (``end``), and why."""
        self.add(what, replica, {"request": request_id} | ({} if reason is None else {"reason": reason}), {})

    def note_restart(self) -> None:
        """Notes that every request waits again, after a fault; writes all that is known."""
        self.add("restart", 0, {}, {})
        self.flush()

    # What a line is made of.

    def scope(self, scope: CacheScope) -> int:
        """The number of a scope; written before it is first used."""
        is_known = scope in self._names.get("scope", ())
        number = self._number("scope", scope)
        if not is_known:
            parts = {
                "model": self._number("model", scope.model),
                "epoch": scope.weights_epoch,
                "adapter": None if scope.adapter is None else self._number("adapter", scope.adapter),
                "tenant": self._number("tenant", scope.tenant_salt) if scope.tenant_salt else None,
                "layout": self._number("layout", scope.layout),
            }
            self.add("scope", 0, {"scope": number} | parts, {})
        return number

    def model(self, name: str) -> int:
        """The number of a model."""
        return self._number("model", name)

    def tokens(self, name: Hashable, tokens: Int32) -> Written:
        """A sequence; see ``PageDigests.write``."""
        return self.digests.write(name, tokens)

    @property
    def digests(self) -> PageDigests:
        """What writes sequences; there once there are books."""
        if self._digests is None:
            raise ConfigError("tokens are recorded of books that are not; make the books with the recorder first")
        return self._digests

    def add(self, what: str, replica: int, asked: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
        """Writes a line."""
        if self.is_on:
            self.write(json.dumps((what, replica, asked, outcome), separators=(",", ":")))

    def write(self, line: str) -> None:
        """Writes a line that was made already."""
        if self.is_on:
            self._lines.append(line)

    def stop(self, why: str) -> None:
        """Ends the trace; the engine goes on."""
        self.add("cut", 0, {"why": why}, {})
        self.flush()
        self.is_on = False
        _logger.error("recording has ended: %s", why)

    def flush(self) -> None:
        """Brings what is not in the file yet there."""
        self._flushed = time.perf_counter_ns()
        if self._file is None or not self.is_on:
            return
        text = "".join(_made(self._lines, self._begun))
        if self._left < len(text):
            self.is_on, why = False, f"the trace has reached its limit of {self._limit:,} bytes"
            text = text[: text.rfind("\n", 0, max(self._left, 0)) + 1] + json.dumps(("cut", 0, {"why": why}, {})) + "\n"
            _logger.error("recording has ended: %s", why)
        self._left -= len(text)
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            self.is_on = False
            _logger.error("recording has ended: the trace cannot be written: %s", error)

    def take_lines(self) -> list[str]:
        """The lines since the last call, of a recorder without a file."""
        return [line[:-1] for line in _made(self._lines, self._begun)]

    def _number(self, kind: str, value: Hashable) -> int:
        numbers = self._names.setdefault(kind, {})
        return numbers.setdefault(value, len(numbers))


def _made(lines: list[_Line], begun: int) -> list[str]:
    """Takes lines out and writes out those of which there are many; so that steps do not wait for that."""
    made, lines[:] = [f"{line if isinstance(line, str) else _written(line, begun)}\n" for line in lines], []
    return made


def _written(line: _StepLine | _GrowthLine, begun: int) -> str:
    if len(line) == 2:
        replica, pages = line
        return f'["grow",{replica},{{}},{{"pages":{json.dumps(pack(pages))}}}]'
    step, now, waiting, free, evictable = line
    micros = (now - begun) // 1000
    counts = f'{{"free":{free},"evictable":{evictable}}}'
    return f'["step",0,{{"step":{step},"us":{micros},"waiting":{waiting}}},{counts}]'


def _close(file: TextIO, lines: list[_Line], begun: int) -> None:
    try:
        with file:
            file.write("".join(_made(lines, begun)))
    except (OSError, ValueError) as error:  # the disk is full, or the file was closed
        _logger.error("the end of the trace cannot be written: %s", error)
