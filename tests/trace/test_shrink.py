"""A mistake that was planted into the books is found, and shown by the few calls that it takes."""

from __future__ import annotations

import numpy as np
import pytest
from trace_support import PAGE, SCOPE, events_of, make, serve, vector

from engine.errors import ConfigError
from engine.memory.manager import CacheManager
from engine.memory.rows import ReqToTokenPool
from engine.trace.replay import BROKEN, DIFFERS, RAISED, replay
from engine.trace.shrink import _fewest, shrink


def mixed_run():
    """Forty requests, three at a time, of which some are truncated and forked."""
    rng = np.random.default_rng(5)
    recorder, cache = make(pages=60, rows=6)
    running = {}
    for number in range(40):
        recorder.begin_step()
        tokens = rng.integers(0, 3, rng.integers(5, 25)).astype(np.int32)
        admission = cache.admit(SCOPE, tokens, most_tokens=40)
        cache.grow(vector(admission.row), vector(tokens.size - admission.cached_tokens))
        cache.mark_computed([admission.row], [tokens.size])
        running[admission.row] = tokens
        cache.grow(np.array(list(running), np.int32), 1)
        if number % 5 == 3:
            cache.truncate(admission.row, tokens.size - 2)
        if number % 7 == 3:
            child = cache.fork(admission.row, int(tokens.size - 4))
            cache.release(child, SCOPE, tokens[:0])
        if len(running) > 3:
            row = next(iter(running))
            cache.release(row, SCOPE, running.pop(row))
    return events_of(recorder.take_lines())


def whats(lines):
    return [event.what for event in events_of(lines)]


def forgets_pages_of_truncate(monkeypatch):
    """Truncation takes pages out of the row and never gives them back."""
    release = CacheManager._release

    def truncate(self, row, tokens):
        before = self.page_table.kv_len(row)
        self._release = (lambda pages: None) if before - tokens > 1 else lambda pages: release(self, pages)
        try:
            original(self, row, tokens)
        finally:
            del self._release

    original = CacheManager.truncate
    monkeypatch.setattr(CacheManager, "truncate", truncate)


def test_a_leak_is_shown_by_the_calls_that_leak(monkeypatch):
    events = mixed_run()
    assert replay(events).failure is None
    forgets_pages_of_truncate(monkeypatch)
    failure = replay(events).failure
    assert failure.kind == BROKEN
    small = shrink(events)
    assert small.events <= 3 < 20 < small.before
    assert whats(small.lines)[-1] == "truncate"
    again = replay(events_of(small.lines)).failure
    assert again.signature == failure.signature


def test_a_call_that_raises_is_shown_by_what_it_needs(monkeypatch):
    events = mixed_run()

    def fork_pages(self, row, tokens):
        if tokens > 2 * PAGE:
            raise IndexError("a bug")
        return original(self, row, tokens)

    original = CacheManager._fork_pages
    monkeypatch.setattr(CacheManager, "_fork_pages", fork_pages)
    assert replay(events).failure.kind == RAISED
    small = shrink(events)
    assert [what for what in whats(small.lines) if what not in ("books", "scope")] == [
        *("admit", "grow", "computed", "fork")
    ]


def test_rows_are_left_out_of_events_that_have_several(monkeypatch):
    events = mixed_run()

    def grow(self, growth, pages):
        if np.isin(1, growth.rows):
            raise IndexError("a bug")
        return grown(self, growth, pages)

    grown = ReqToTokenPool.grow
    monkeypatch.setattr(ReqToTokenPool, "grow", grow)
    small = shrink(events)
    grows = [event for event in events_of(small.lines) if event.what == "grow"]
    assert [event.asked["rows"] for event in grows] == [[1]]


def test_another_decision_is_cut_behind():
    recorder, cache = make()
    serve(recorder, cache, [list(range(9))] * 3)
    events = events_of(recorder.take_lines())
    at = [index for index, event in enumerate(events) if event.what == "admit"][1]
    events[at].outcome["cached"] = 0
    small = shrink(events)
    assert small.failure.kind == DIFFERS
    assert whats(small.lines)[-1] == "admit"


def test_there_is_nothing_to_shrink_in_a_sound_trace():
    recorder, cache = make()
    serve(recorder, cache, [list(range(9))])
    with pytest.raises(ConfigError, match="nothing to shrink"):
        shrink(events_of(recorder.take_lines()))


@pytest.mark.parametrize("needed", [set(), {3}, {0, 17}, {5, 6, 31}, set(range(20))])
def test_the_fewest_are_found_where_each_is_needed(needed):
    found = _fewest(list(range(40)), lambda kept: needed <= set(kept))
    assert set(found) == needed
