"""``python -m engine trace``: what its commands print and write, and how they end."""

from __future__ import annotations

import json

import pytest
from trace_support import make, serve

from engine import cli
from engine.memory.manager import CacheManager
from engine.trace.trace_file import read_trace, write_trace


@pytest.fixture
def trace(tmp_path):
    """The file of a run that is sound."""
    recorder, cache = make(pages=12)
    serve(recorder, cache, [list(range(start, start + 14)) for start in range(6)])
    path = tmp_path / "run.trace"
    write_trace(path, recorder.take_lines())
    return path


def test_a_sound_trace_is_played(trace, capsys):
    assert cli.main(["trace", "replay", str(trace)]) == 0
    assert "the books were sound after every step, and every decision came out again" in capsys.readouterr().out


def test_a_failing_trace_is_played_and_shrunk(trace, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CacheManager, "_sharing", lambda self, row, pages: [][1])
    assert cli.main(["trace", "replay", str(trace)]) == 1
    assert "IndexError" in capsys.readouterr().out
    small = tmp_path / "small.trace"
    assert cli.main(["trace", "shrink", str(trace), "-o", str(small)]) == 0
    assert "events fail alike" in capsys.readouterr().out
    assert [event.what for event in read_trace(small).events][-1] in ("publish", "release")
    assert cli.main(["trace", "replay", str(small)]) == 1
    assert small.stat().st_mode & 0o777 == 0o600
    assert cli.main(["trace", "view", str(small), "-o", str(tmp_path / "page.html")]) == 1


def test_stats_are_printed(trace, capsys):
    assert cli.main(["trace", "stats", str(trace)]) == 0
    text = capsys.readouterr().out
    assert "6, 0 retractions" in text
    assert "at most " in text
    assert "raised        nothing" in text


def test_a_page_is_written(trace, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["trace", "view", str(trace), "-o", str(page), "--first", "3", "--last", "9"]) == 0
    assert page.read_text().startswith("<!doctype html>")
    assert "7 moments" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["replay"], ["stats"], ["shrink", "-o", "/nowhere/x"], ["view", "-o", "/nowhere/x"]]
)
def test_mistakes_are_one_line(trace, command, tmp_path, capsys):
    name, *rest = command
    assert cli.main(["trace", name, str(tmp_path / "absent"), *rest]) == 2
    assert capsys.readouterr().err.startswith("ConfigError: cannot read")
    if rest:
        assert cli.main(["trace", name, str(trace), *rest]) == 2
        assert capsys.readouterr().err.startswith("ConfigError: ")


def test_a_trace_is_lines_of_json(trace):
    for line in trace.read_text().splitlines():
        json.loads(line)
