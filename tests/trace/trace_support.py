"""Runs of the control plane that are recorded, and what to make of their lines."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np

from engine.memory.page_map import PageMap
from engine.memory.scope import CacheScope, LayoutKey
from engine.trace.recorded_books import RecordedCacheManager
from engine.trace.recorder import Recorder
from engine.trace.trace_file import parse_events

sys.path.insert(0, str(Path(__file__).parents[1] / "memory"))  # whose state machine makes random runs
state_machines = importlib.import_module("test_manager_machine")

PAGE = 4
SCOPE = CacheScope("a model", 0, None, "", LayoutKey.of({"version": 1}))
TENANT = CacheScope("a model", 0, None, "hush", LayoutKey.of({"version": 1}))


def events_of(lines):
    """The events of a recorder's lines."""
    return parse_events(lines[1:], first_line=2)


def maps_agree(one, other):
    """Whether two books have every page in the same place."""
    mine, theirs = PageMap.of(one), PageMap.of(other)
    return all(
        np.array_equal(getattr(mine, name), getattr(theirs, name))
        for name in ("state", "group", "row", "rows", "before")
    )


def make(pages=24, rows=5, context=64, **options):
    """A recorder and its books."""
    recorder = Recorder()
    return recorder, RecordedCacheManager(recorder, pages * PAGE, PAGE, rows, context, **options)


def vector(*tokens):
    return np.array(tokens, np.int32)


def serve(recorder, cache, prompts, answer=6, scope=SCOPE):
    """Serves prompts one after the other, a token a step."""
    for number, prompt in enumerate(prompts):
        recorder.begin_step(len(prompts) - number - 1)
        tokens = np.array(prompt, np.int32)
        admission = cache.admit(scope, tokens, most_tokens=tokens.size + answer)
        row = admission.row
        recorder.note_run(0, number, row, scope)
        cache.grow(vector(row), vector(tokens.size - admission.cached_tokens))
        cache.mark_computed([row], [tokens.size])
        cache.publish(row, scope, tokens)
        for _ in range(answer):
            recorder.begin_step(0)
            cache.grow(vector(row), 1)
        cache.mark_computed([row], [tokens.size + answer])
        recorder.note_request("end", 0, number, "length")
        cache.release(row, scope, np.concatenate([tokens, np.arange(answer, dtype=np.int32) + 1000 * number]))
