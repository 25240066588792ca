"""What was recorded comes out again: the same decisions, the same books, and no secrets in the file."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import rule, run_state_machine_as_test
from trace_support import PAGE, SCOPE, TENANT, events_of, make, maps_agree, serve, state_machines, vector

from engine.errors import ConfigError, KVPoolExhausted, ShapeError
from engine.trace.player import Player
from engine.trace.recorded_books import RecordedCacheManager, RecordedHostTier
from engine.trace.recorder import Recorder
from engine.trace.replay import DIFFERS, RAISED, replay
from engine.trace.resolver import resolved
from engine.trace.trace_file import read_trace


def test_a_run_comes_out_again():
    recorder, cache = make(pages=12)
    rng = np.random.default_rng()
    trunk = rng.integers(0, 2**31, 12).tolist()
    serve(recorder, cache, [[*trunk, *rng.integers(0, 99, n).tolist()] for n in (3, 9, 1, 14, 2, 8)])
    lines = recorder.take_lines()
    result = replay(events_of(lines))
    assert result.failure is None
    assert result.is_exact
    assert result.steps == recorder.steps
    assert any("evicted" in line for line in lines)
    assert any('"cached":12' in line for line in lines), "no prefix was shared"


def test_a_step_that_repeats_the_one_before_it_is_one_short_line():
    recorder, cache = make()
    row = cache.admit(SCOPE, vector(1, 2, 3)).row
    for _ in range(3):
        cache.grow(vector(row), 1)
    assert recorder.take_lines()[-1] == '["grow",0,{},{}]'


def test_neither_tokens_nor_salts_nor_names_are_written():
    recorder, cache = make()
    prompt = [1234567 + 7 * index for index in range(3 * PAGE)]
    serve(recorder, cache, [prompt], scope=TENANT)
    text = "\n".join(recorder.take_lines())
    assert not [word for word in (*map(str, prompt), "hush", "a model") if word in text]


def test_equal_pages_have_other_digests_in_another_trace():
    def digests():
        recorder, cache = make()
        cache.admit(SCOPE, vector(*range(8)))
        return [event.asked["tokens"] for event in events_of(recorder.take_lines()) if event.what == "admit"]

    assert digests() != digests()


def test_refusals_come_out_again():
    recorder, cache = make(pages=6, rows=1)
    row = cache.admit(SCOPE, vector(*range(8)), most_tokens=20).row
    assert cache.admit(SCOPE, vector(1)) is None
    with pytest.raises(KVPoolExhausted):
        cache.grow(vector(row), vector(60))
    with pytest.raises(ShapeError):
        cache.truncate(row, 63)
    with pytest.raises(ConfigError):
        cache.admit("no scope", vector(1))
    lines = recorder.take_lines()
    assert [event.error for event in events_of(lines) if event.error] == ["KVPoolExhausted", "ShapeError"]
    assert replay(events_of(lines)).failure is None


def test_another_decision_is_found():
    recorder, cache = make()
    serve(recorder, cache, [list(range(9)), list(range(9))])
    events = events_of(recorder.take_lines())
    at = max(index for index, event in enumerate(events) if event.what == "admit")
    events[at].outcome["cached"] = 4
    failure = replay(events).failure
    assert (failure.kind, failure.what, failure.line) == (DIFFERS, "admit", events[at].line)


def test_a_call_that_now_raises_is_found(monkeypatch):
    recorder, cache = make()
    serve(recorder, cache, [list(range(9)), list(range(9))])
    events = events_of(recorder.take_lines())

    def raising(self, *arguments):
        raise KeyError("a bug")

    monkeypatch.setattr("engine.memory.manager.CacheManager._advance", raising)
    assert replay(events).failure.kind == RAISED


def test_a_trace_that_reaches_its_limit_ends_and_stays_playable(tmp_path, caplog):
    path = tmp_path / "trace"
    with open(path, "w") as file:
        recorder = Recorder(file, most_bytes=3000)
        cache = RecordedCacheManager(recorder, 24 * PAGE, PAGE, 5, 64)
        serve(recorder, cache, [list(range(20))] * 9)
        recorder.flush()
    assert path.stat().st_size < 3200
    assert "limit" in caplog.text
    trace = read_trace(path)
    assert trace.events[-1].what == "cut"
    assert replay(trace.events).failure is None


def test_behind_its_end_a_trace_costs_neither_digests_nor_memory(monkeypatch):
    recorder, cache = make()
    recorder.stop("a test")

    def forbidden(*arguments):
        raise AssertionError("nothing is written any more")

    for name in ("scope", "tokens"):
        monkeypatch.setattr(recorder, name, forbidden)
    serve(recorder, cache, [list(range(9)), list(range(9))])
    assert len(recorder.take_lines()) == 3  # the head, the books, and why it ended


def test_a_file_is_the_users_own_and_has_all_once_its_recorder_is_gone(tmp_path):
    path = tmp_path / "trace"
    recorder = Recorder.to_path(path)
    cache = RecordedCacheManager(recorder, 24 * PAGE, PAGE, 5, 64)
    serve(recorder, cache, [list(range(20))] * 2)
    del recorder, cache
    gc.collect()
    assert path.stat().st_mode & 0o777 == 0o600
    assert replay(read_trace(path).events).failure is None
    with path.open("a") as file:
        file.write('["grow",0,{},')  # as a crash leaves it
    assert replay(read_trace(path).events).failure is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "no fused-kv-engine trace"),
        (lambda lines: ["nonsense"], "not JSON"),
        (lambda lines: [lines[0].replace('"version": 1', '"version": 9')], "of version 1"),
        (lambda lines: [*lines, '["fly",0,{},{}]'], "no kind of event"),
        (lambda lines: [*lines, '["truncate",0,{"row":1},{}]'], "lacks tokens"),
        (lambda lines: [*lines, "[1]"], "is not"),
        (lambda lines: [*lines, '["reset",7,{},{}]'], "replica 7"),
        (lambda lines: [lines[0], '["release",0,{"row":1,"scope":0,"tokens":[0,0,""]},{}]'], "before there are books"),
        (lambda lines: [*lines, '["publish",0,{"row":0,"scope":0,"tokens":[8,2,""]},{}]'], "are wrong"),
        (lambda lines: [*lines, '["leave",0,{"rows":"???"},{}]'], "no integers"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(tmp_path, change, message):
    recorder, _ = make()
    path = tmp_path / "trace"
    path.write_text("".join(f"{line}\n" for line in change(recorder.take_lines())))
    with pytest.raises(ConfigError, match=message):
        replay(read_trace(path).events)
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(tmp_path / "absent")


def recorded_machine(windows, faults):
    """The state machine over books that record, whose end plays what was recorded."""
    base = state_machines.ManagerMachine if faults else state_machines.WithoutFaults

    class Machine(base):
        evict = None  # which is no part of the front door

        @rule()
        def reset(self):
            super().reset(None)  # what a fault before its first change leaves is checked there by chance

        @rule()
        def replace_weights(self):
            self.epoch += 1
            self.cache.raise_weights_epoch("model", self.epoch)

        def make_moves(self):
            self.recorder.begin_step(len(self.flights))
            super().make_moves()

        def teardown(self):
            if not hasattr(self, "cache"):
                return
            player = Player()
            events = events_of(self.recorder.take_lines())
            result = replay(events)
            assert result.failure is None, result.failure.describe()
            assert faults or result.is_exact
            if result.is_exact:
                for event in resolved(events):
                    player.play(event)
                assert maps_agree(self.cache, player.books[0])

    Machine.windows = windows
    return Machine


def play(monkeypatch, windows, examples, *, faults):
    machine = recorded_machine(windows, faults)

    def manager(*arguments, **options):
        manager.recorder = Recorder()
        return RecordedCacheManager(manager.recorder, *arguments, **options)

    monkeypatch.setattr(state_machines, "CacheManager", manager)
    monkeypatch.setattr(state_machines, "HostTier", lambda *arguments: RecordedHostTier(manager.recorder, *arguments))
    machine.recorder = property(lambda self: self.cache.recorder)
    options = {"stateful_step_count": 40, "deadline": None, "suppress_health_check": list(HealthCheck)}
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, **options))


@pytest.mark.parametrize(("windows", "examples"), [((None,), 20), ((None, 8), 8), ((9,), 6)])
@pytest.mark.parametrize("faults", [False, True])
def test_whatever_was_called_in_any_order_comes_out_again(monkeypatch, faults, windows, examples):
    play(monkeypatch, windows, examples, faults=faults)


@pytest.mark.slow
@pytest.mark.parametrize("windows", [(None,), (None, 8), (None, 4, 13), (None, None, 6), (9,), (4, 11)])
@pytest.mark.parametrize("faults", [False, True])
def test_the_same_for_long(monkeypatch, faults, windows):
    play(monkeypatch, windows, 80, faults=faults)


def test_the_header_says_what_the_file_is():
    recorder, _ = make()
    header = json.loads(recorder.take_lines()[0])
    assert header["format"] == "fused-kv-engine trace"
    assert header["version"] == 1
