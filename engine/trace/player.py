"""Plays a trace on fresh books: the real cache managers and host tier, fed with the same calls.

The books record themselves while they are played, so what comes of a call is written by the same code and can be
compared word for word. Rows are translated: a part of a trace may be given other rows than the whole.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from engine import errors
from engine.errors import ConcurrentUse, ConfigError, EngineError, IntegrityError, ProcessLost
from engine.memory.integers import Int32, Int64
from engine.memory.manager import CacheManager
from engine.memory.offload import HostTier, PageFormat
from engine.memory.scope import Adapter, CacheScope, LayoutKey
from engine.trace.recorded_books import RecordedCacheManager, RecordedHostTier
from engine.trace.recorder import Recorder
from engine.trace.trace_file import TraceEvent, parse_events

NOT_PLAYED = ("run", "retract", "end", "restart", "cut")  # they say who it was for
NO_ROOM = ("KVPoolExhausted", "RequestTooLarge")  # refusals that are decisions


class Player:
    """Plays events one by one.

    Until a call of the trace was broken off by a fault, such as an interrupt, every call must be possible. From then
    on, and in a trace of which a part was left out, what is not possible is left out.

    Args:
        is_whole: whether this is a whole trace from its beginning.

    Attributes:
        recorder: has the lines of what was played.
        books: the books of each replica.
        tier: the host tier, where there is one.
        tenants: the tenant of each scope, a number, or None.
        is_exact: whether every call so far was made as it was recorded.
        skipped: calls that were left out.
    """

    def __init__(self, *, is_whole: bool = True) -> None:
        self.recorder = Recorder()
        self.books: list[CacheManager] = []
        self.tier: HostTier | None = None
        self.tenants: dict[CacheScope, int | None] = {}
        self.is_exact = is_whole
        self.skipped = 0
        self.lines = self.recorder.take_lines()
        self._scopes: dict[int, CacheScope] = {}
        self._rows: list[dict[int, int]] = []
        self._plays: dict[str, Callable[[CacheManager, TraceEvent], object]] = {
            name: getattr(self, f"_{name}")
            for name in (
                *("admit", "share", "grow", "truncate", "computed", "leave", "publish", "fork", "release"),
                *("moves", "reset", "epoch", "clear", "store"),
            )
        }

    def play(self, event: TraceEvent) -> TraceEvent | None:
        """Plays an event; returns it as it came out here, None where it was left out.

        Raises:
            ConfigError: the trace is wrong.
            Exception: what the call raises, unless it is a refusal for want of room, or the call is to be left out.
        """
        if event.what == "cut":
            return event
        if event.what in NOT_PLAYED:
            self._copy(event)
            return event
        if event.what in ("books", "tier", "scope", "step"):
            {"books": self._make_books, "tier": self._make_tier, "scope": self._make_scope, "step": self._begin}[
                event.what
            ](event)
            return self._played(event)
        if not 0 <= event.replica < len(self.books):
            raise ConfigError(f"line {event.line} of the trace is of replica {event.replica}, which has no books")
        if event.error is not None and _is_fault(event.error):
            self.is_exact = False  # it was broken off, and what it did is not known
            if event.what not in ("release", "reset", "clear"):
                self.skipped += 1
                return None
        return self._call(event)

    def row(self, replica: int, recorded: int) -> int | None:
        """The row here that a recorded row stands for."""
        return self._rows[replica].get(recorded)

    def tenant(self, scope: int) -> int | None:
        """The tenant of a recorded scope."""
        return self.tenants[self._scopes[scope]]

    def check(self) -> None:
        """Proves that all books are sound; else IntegrityError."""
        for cache in self.books:
            cache.check_integrity()

    def _call(self, event: TraceEvent) -> TraceEvent | None:
        try:
            self._plays[event.what](self.books[event.replica], event)
        except _LeftOut:
            self.skipped += 1
            self._played(event)
            return None
        except Exception as error:
            is_answer = isinstance(error, EngineError) and not isinstance(error, IntegrityError)
            if not is_answer or (self.is_exact and type(error).__name__ not in (event.error, *NO_ROOM)):
                self._played(event)
                raise
        played = self._played(event)
        if played is None:
            return None
        if event.what in ("admit", "fork"):
            self._enter(event, played)
        return played

    def _played(self, event: TraceEvent) -> TraceEvent | None:
        """The line that was recorded of it; all lines are kept."""
        lines = self.recorder.take_lines()
        self.lines += lines
        found = [each for each in parse_events(lines) if each.what == event.what]
        return replace(found[-1], line=event.line) if found else None

    def _copy(self, event: TraceEvent) -> None:
        asked = dict(event.asked)
        if event.what == "run":
            row = self.row(event.replica, asked["row"])
            if row is None:
                return
            asked |= {"row": row, "scope": self.recorder.scope(self._scope(asked))}
        self.recorder.add(event.what, event.replica, asked, event.outcome)
        self.lines += self.recorder.take_lines()

    # What the rest stands on.

    def _make_books(self, event: TraceEvent) -> None:
        self.books.append(RecordedCacheManager(self.recorder, **event.asked))
        self._rows.append({})

    def _make_tier(self, event: TraceEvent) -> None:
        cache = self.books[event.replica]
        if self.tier is None:  # whose pages hold a byte for each token
            layout: dict[str, int | str] = {"page_size": cache.page_size, "head_num": 1, "head_dim": 1, "dtype": "int8"}
            page_format = PageFormat(1, np.dtype(np.int8), layout, cache.page_table.windows)
            self.tier = RecordedHostTier(self.recorder, event.asked["pages"] * page_format.page_bytes, page_format)
        cache.attach_host_tier(self.tier)

    def _make_scope(self, event: TraceEvent) -> None:
        asked = event.asked
        adapter = None if asked["adapter"] is None else Adapter(f"adapter {asked['adapter']}")
        salt = "" if asked["tenant"] is None else f"tenant {asked['tenant']}"
        layout = LayoutKey.of({"layout": asked["layout"]})
        scope = CacheScope(f"model {asked['model']}", asked["epoch"], adapter, salt, layout)
        self._scopes[asked["scope"]] = scope
        self.tenants[scope] = asked["tenant"]
        self.recorder.scope(scope)

    def _begin(self, event: TraceEvent) -> None:
        self.recorder.steps = event.asked["step"] - 1
        self.recorder.begin_step(event.asked["waiting"])

    # The calls.

    def _admit(self, cache: CacheManager, event: TraceEvent) -> None:
        asked = event.asked
        tokens: Int32 = asked["tokens"]
        options: dict[str, Any] = {"most_tokens": asked["most"], "priority": asked["priority"]}
        admission = cache.admit(self._scope(asked), tokens, counts_hit=asked["counts"], **options)
        if admission is not None and "row" not in event.outcome and not self.is_exact:
            cache.release(admission.row, self._scope(asked), tokens[:0])  # nobody would

    def _share(self, cache: CacheManager, event: TraceEvent) -> None:
        asked = event.asked
        cache.share(self._row(event), self._scope(asked), asked["tokens"], counts_hit=asked["counts"])

    def _grow(self, cache: CacheManager, event: TraceEvent) -> None:
        rows, kept = self._known(event.replica, event.asked["rows"])
        counts = event.asked["counts"]
        cache.grow(rows, counts if isinstance(counts, int) or counts.size != event.asked["rows"].size else counts[kept])

    def _truncate(self, cache: CacheManager, event: TraceEvent) -> None:
        cache.truncate(self._row(event), event.asked["tokens"])

    def _computed(self, cache: CacheManager, event: TraceEvent) -> None:
        rows, kept = self._known(event.replica, event.asked["rows"])
        tokens = event.asked["tokens"][kept]
        if not self.is_exact:
            tokens = np.minimum(tokens, cache.page_table.kv_lens(rows))
        cache.mark_computed(rows, tokens)

    def _leave(self, cache: CacheManager, event: TraceEvent) -> None:
        cache.leave_behind(self._known(event.replica, event.asked["rows"])[0])

    def _publish(self, cache: CacheManager, event: TraceEvent) -> None:
        cache.publish(self._row(event), self._scope(event.asked), event.asked["tokens"])

    def _fork(self, cache: CacheManager, event: TraceEvent) -> None:
        cache.fork(self._row(event), event.asked["tokens"])

    def _release(self, cache: CacheManager, event: TraceEvent) -> None:
        row, tokens = self._row(event), event.asked["tokens"]
        is_known = event.error is None or not _is_fault(event.error)
        self._rows[event.replica].pop(event.asked["row"], None)
        cache.release(row, self._scope(event.asked), tokens if is_known else tokens[:0])

    def _moves(self, cache: CacheManager, event: TraceEvent) -> None:
        cache.take_moves()

    def _reset(self, cache: CacheManager, event: TraceEvent) -> None:
        cache.reset_prefix_cache()

    def _epoch(self, cache: CacheManager, event: TraceEvent) -> None:
        cache.raise_weights_epoch(f"model {event.asked['model']}", event.asked["epoch"])

    def _clear(self, cache: CacheManager, event: TraceEvent) -> None:
        self._rows[event.replica].clear()
        cache.clear()

    def _store(self, cache: CacheManager, event: TraceEvent) -> None:
        tokens: Int32 = event.asked["tokens"]
        if self.tier is None:
            raise ConfigError(f"line {event.line} of the trace puts pages into a host tier that is not there")
        count = tokens.size // cache.page_size - event.asked["first"]
        data = np.zeros((count, *self.tier.page_format.page_shape), np.int8)
        self.tier.put(self._scope(event.asked), tokens, event.asked["first"], data, event.asked["group"])

    # What they are asked.

    def _scope(self, asked: dict[str, Any]) -> CacheScope:
        scope = self._scopes.get(asked["scope"])
        if scope is None:
            raise ConfigError(f"the trace has no scope {asked['scope']}")
        return scope

    def _row(self, event: TraceEvent) -> int:
        row = self.row(event.replica, event.asked["row"])
        if row is None and not self.is_exact:
            raise _LeftOut
        return event.asked["row"] if row is None else row  # which the books refuse

    def _known(self, replica: int, recorded: Int32) -> tuple[Int32, Int64]:
        """The rows that recorded rows stand for, and which of them there are."""
        rows = self._rows[replica]
        if self.is_exact:  # the books refuse a row that is not there
            return np.array([rows.get(row, row) for row in recorded.tolist()], np.int32), np.arange(recorded.size)
        kept = [index for index, row in enumerate(recorded.tolist()) if row in rows]
        if not kept and recorded.size:
            raise _LeftOut
        return np.array([rows[int(recorded[index])] for index in kept], np.int32), np.array(kept, np.int64)

    def _enter(self, event: TraceEvent, played: TraceEvent) -> None:
        if "row" in event.outcome and "row" in played.outcome:
            self._rows[event.replica][event.outcome["row"]] = played.outcome["row"]


class _LeftOut(Exception):
    """The call is about a row that is not there in this part of the trace."""


def _is_fault(name: str) -> bool:
    """Whether an error of this name came from outside of the books, so that it does not come again."""
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    if not isinstance(kind, type):
        return True
    outside = (OSError, MemoryError, KeyboardInterrupt, SystemExit, ConcurrentUse, ProcessLost)
    return not issubclass(kind, Exception) or issubclass(kind, outside)
