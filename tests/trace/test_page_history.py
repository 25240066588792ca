"""The page of a trace: its data is what the books say, moment by moment; it stands alone and is bounded."""

from __future__ import annotations

import gc
import gzip
import json
import re
import struct
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from trace_support import PAGE, TENANT, events_of, make, serve, vector

from engine.memory.page_map import CACHED, FREE, HELD, LOCKED, PageMap
from engine.memory.pool_snapshot import snapshot_pool
from engine.trace import page_history
from engine.trace.event_text import event_text
from engine.trace.page_code import code_pages
from engine.trace.page_history import PageHistory
from engine.trace.page_html import live_page, trace_page
from engine.trace.resolver import resolved
from engine.trace.trace_file import Trace, parse_events


def some_trace(windows=(None,), prompts=12):
    """A trace, and the map and counts of the books after each of its steps."""
    rng = np.random.default_rng()
    recorder, cache = make(pages=24 * len(windows), windows=windows)
    maps = []
    begin = recorder.begin_step

    def begin_step(waiting=0):
        maps.append((PageMap.of(cache), snapshot_pool(cache)))
        begin(waiting)

    recorder.begin_step = begin_step
    trunk = rng.integers(0, 2**31, 12).tolist()
    serve(recorder, cache, [[*trunk, *rng.integers(0, 99, 5).tolist()] for _ in range(prompts)], scope=TENANT)
    maps.append((PageMap.of(cache), snapshot_pool(cache)))
    return Trace({}, events_of(recorder.take_lines())), maps


@pytest.mark.parametrize("windows", [(None,), (None, 8), (9,)])
def test_the_map_counts_what_the_metrics_count(windows):
    _, maps = some_trace(windows)
    for pages, snapshot in maps:
        assert pages.counts() == (
            *(snapshot.free_pages, snapshot.private_pages),
            *(snapshot.locked_pages, snapshot.evictable_pages),
        )
    assert {state for pages, _ in maps for state in pages.state.tolist()} == {FREE, HELD, LOCKED, CACHED}


def test_the_map_says_whose_a_page_is_and_what_comes_before_it():
    _, cache = make()
    row = cache.admit(TENANT, vector(*range(11)), most_tokens=20).row
    cache.grow(vector(row), vector(11))
    cache.mark_computed([row], [11])
    cache.publish(row, TENANT, vector(*range(11)))
    other = cache.admit(TENANT, vector(*range(8), 7), most_tokens=20).row
    pages = PageMap.of(cache)
    first, second, third = cache.page_table.row_pages(row).tolist()
    assert pages.state[[first, second, third]].tolist() == [LOCKED, LOCKED, HELD]
    assert pages.before[[first, second, third]].tolist() == [0, first, 0]
    assert pages.rows[[first, second, third]].tolist() == [2, 2, 1]
    assert pages.scopes == (TENANT,)
    code, owner, before = code_pages(pages, {row: 1, other: 2}, {TENANT: 6})
    assert owner[first] == 1
    assert code[first] == LOCKED + 4 + 2048 * 7
    assert before[second] == first


def data_of(page):
    """The facts and changes that a page was filled with."""
    (text,) = re.findall(r'id="data">([^<]*)<', page)
    packed = gzip.decompress(b64decode(text))
    (size,) = struct.unpack_from("<I", packed)
    return json.loads(packed[4 : 4 + size]), np.frombuffer(packed[4 + size + -size % 4 :], "<i4")


@pytest.mark.parametrize("windows", [(None,), (None, 8)])
def test_a_page_has_every_moment_as_the_books_had_it(windows):
    trace, maps = some_trace(windows)
    facts, words = data_of(trace_page(PageHistory.of(trace), "today"))
    (replica,) = facts["replicas"]
    changes = words.reshape(4, -1)
    now, at = np.zeros((3, replica["about"]["pages"] + 1), np.int32), 0
    assert facts["steps"] == list(range(len(maps)))
    for moment, (pages, _) in enumerate(maps):
        size = replica["sizes"][moment]
        now[:, changes[0, at : at + size]] = changes[1:, at : at + size]
        at += size
        np.testing.assert_array_equal(now[0] & 3, pages.state)
        np.testing.assert_array_equal(now[0] >> 3 & 255, pages.group)
        np.testing.assert_array_equal(now[1] > 0, pages.row >= 0)
        np.testing.assert_array_equal(now[2], pages.before)
        assert replica["counts"][moment] == list(pages.counts())
    assert {request["tenant"] for request in facts["requests"]} == {0}
    assert [request["id"] for request in facts["requests"]] == list(range(12))
    words = [text for texts in facts["texts"] for text in texts]
    assert any(re.fullmatch(r"request 3 is admitted: 12 of 17 tokens cached", text) for text in words)
    assert "request 3 ends (length)" in words
    assert "request 3 gives its row back" in words


def test_a_long_trace_is_thinned_and_a_part_of_it_is_shown_whole(monkeypatch):
    trace, maps = some_trace()
    monkeypatch.setattr(page_history, "MOST_MOMENTS", 10)
    thin = PageHistory.of(trace)
    assert 5 <= len(thin.steps) <= 11
    part = PageHistory.of(trace, first=20, last=28)
    assert part.steps == list(range(20, 29))
    assert part.replicas[0].counts == [pages.counts() for pages, _ in maps[20:29]]


def test_a_failing_trace_is_shown_up_to_its_failure():
    trace, _ = some_trace()
    at = [index for index, event in enumerate(trace.events) if event.what == "admit"][3]
    trace.events[at].outcome["cached"] = 1
    history = PageHistory.of(trace)
    assert history.failure.what == "admit"
    assert len(history.steps) > 3
    assert "another decision" in trace_page(history, "") or data_of(trace_page(history, ""))[0]["failure"]


def test_the_page_asks_nobody_for_anything():
    trace, _ = some_trace()
    page = trace_page(PageHistory.of(trace), "today")
    assert "default-src 'none'" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert not re.findall(r"https?://", page)
    assert "/*" not in re.sub(r"<style>.*?</style>|<script>.*?</script>", "", page, flags=re.DOTALL)
    assert '"live": "/pages/state"' in live_page("/pages/state")


def test_every_event_has_words():
    recorder, cache = make(pages=8)
    row = cache.admit(TENANT, vector(*range(6)), most_tokens=20).row
    cache.grow(vector(row), vector(6))
    cache.mark_computed([row], [6])
    cache.truncate(row, 5)
    child = cache.fork(row, 5)
    cache.publish(row, TENANT, vector(*range(6)))
    for each in (row, child):
        cache.release(each, TENANT, vector(*range(6)))
    assert cache.admit(TENANT, vector(*range(28)), most_tokens=30) is not None
    assert cache.admit(TENANT, vector(*range(28)), most_tokens=30) is None
    cache.reset_prefix_cache()
    cache.raise_weights_epoch("a model", 1)
    cache.clear()
    texts = [event_text(event, lambda row: f"row {row}") for event in resolved(events_of(recorder.take_lines()))]
    assert "row 0 is cut to 5 tokens" in texts
    assert "row 0 is forked at 5 tokens" in texts
    assert "a request of 28 tokens waits for room" in texts
    assert "the prefix cache is reset" in texts
    assert "the weights are replaced: epoch 1" in texts
    assert PAGE == 4


def test_the_example_of_the_page_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "pages.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    gc.collect()
    (lines,) = re.findall(r"```jsonl\n(.*?)```", page, re.DOTALL)
    assert len(parse_events(lines.splitlines())) == 4
