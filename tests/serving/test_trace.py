"""Traces through a tight pool: the benchmark's own judgement, and small versions of its run."""

import dataclasses
import json

import numpy as np
import pytest
from serving_support import VOCAB

from engine.bench.serve import Served, compare, run_trace, tail_waste
from engine.bench.trace import TraceRequest, TraceShape, load_trace, make_trace, save_trace
from engine.errors import ConfigError
from engine.serving.request import RequestOutput

SMALL = TraceShape(
    requests=40, rate=0.7, prompt_tokens=15, new_tokens=12, prefixes=2, prefix_tokens=20, longest=80, vocabulary=VOCAB
)
OPTIONS = {"max_running_requests": 12, "chunked_prefill_size": 32}


def check(llama, trace, page_size, tier=0, **options):
    tight, served, bars = run_trace(
        trace,
        llama,
        share=1 / 3,
        options={**OPTIONS, "page_size": page_size, **options},
        tight_options={"host_tier_bytes": tier},
    )
    assert [bar.what for bar in bars if bar.is_correctness and not bar.holds] == []
    tight.cache.check_integrity()
    return tight, served


def test_a_small_trace_through_a_third_of_the_pool_is_answered_as_without_limit(llama):
    tight, served = check(llama, make_trace(SMALL, 3), 4)
    metrics = tight.metrics()
    assert metrics.retractions > 0
    assert metrics.prefix_cache.hit_tokens > 0
    assert metrics.finished["abort"] > 0
    assert tail_waste(served) == pytest.approx(1.5, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
@pytest.mark.parametrize("tier", [0, 1 << 18])
def test_a_varied_trace_is_answered_as_without_limit(llama, page_size, tier):
    """Priorities, timeouts, several answers and tenants."""
    shape = dataclasses.replace(SMALL, requests=150, variety=True)
    trace = make_trace(shape, int(np.random.default_rng().integers(2**31)))
    tight, _ = check(llama, trace, page_size, tier)
    finished = tight.metrics().finished
    assert finished["timeout"] > 0
    assert finished["abort"] > 0
    if tier and page_size < 64:
        assert tight.metrics().host_tier.stored_pages > 0


@pytest.mark.slow
def test_a_trace_without_the_prefix_cache_is_answered_as_without_limit(llama):
    check(llama, make_trace(SMALL, 4), 8, disable_radix_cache=True)


def test_a_trace_is_the_same_for_the_same_seed_and_comes_back_from_its_file(tmp_path):
    for shape in (SMALL, dataclasses.replace(SMALL, variety=True)):
        trace = make_trace(shape, 7)
        assert trace == make_trace(shape, 7) != make_trace(shape, 8)
        save_trace(trace, tmp_path / "trace.jsonl")
        assert load_trace(tmp_path / "trace.jsonl") == trace


def test_a_trace_has_the_shape_that_was_asked_for():
    shape = TraceShape(requests=2000, rate=0.25, aborts=0.2, longest=400)
    trace = make_trace(shape, 1)
    assert trace[-1].arrival / 2000 == pytest.approx(4, rel=0.15)
    assert np.median([request.max_new_tokens for request in trace]) == pytest.approx(shape.new_tokens, rel=0.15)
    assert np.mean([request.abort_after is not None for request in trace]) == pytest.approx(0.2, abs=0.04)
    assert max(len(request.prompt) + request.max_new_tokens for request in trace) <= 400
    beginnings = [request.prompt[: shape.prefix_tokens] for request in trace]
    assert sum(beginnings.count(each) > 1 for each in set(beginnings)) == shape.prefixes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot read a trace"),
        ("not json", "cannot read a trace"),
        (json.dumps({"format": "engine-trace", "version": 2, "requests": 0}), "not a whole engine-trace of version 1"),
        (json.dumps({"format": "engine-trace", "version": 1, "requests": 1}), "not a whole engine-trace"),
        ('{"format": "engine-trace", "version": 1, "requests": 1}\n{"arrival": 0}', "cannot read a trace"),
        (
            '{"format": "engine-trace", "version": 1, "requests": 1}\n'
            '{"arrival": 0, "prompt": [-1], "max_new_tokens": 1}',
            "must be whole numbers",
        ),
        (
            '{"format": "engine-trace", "version": 1, "requests": 1}\n'
            '{"arrival": 0, "prompt": [1], "max_new_tokens": 0}',
            "max_new_tokens=0",
        ),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path, content, message):
    path = tmp_path / "trace.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_trace(path)


def answer(tokens, finish="length", logits=None, siblings=()):
    return RequestOutput([1], list(tokens), "", finish, logits=logits, siblings=tuple(siblings))


@pytest.mark.parametrize(
    ("got", "counts"),
    [
        (answer([3, 4]), (1, 0, 0)),
        (answer([3, 5]), (0, 1, 0)),  # the two logits are equal but for rounding
        (answer([3, 6]), (0, 0, 1)),
        (answer([9, 4]), (0, 0, 1)),
        (answer([3]), (0, 0, 1)),  # too short
        (answer([3], "timeout"), (1, 0, 0)),
        (answer([9], "timeout"), (0, 0, 1)),
        (answer([3, 4], siblings=[answer([3, 4]), answer([3, 6])]), (2, 0, 1)),
    ],
)
def test_an_answer_counts_as_exact_near_or_wrong(got, counts):
    logits = np.zeros((2, 10), np.float32)
    logits[0, 3], logits[1, 4], logits[1, 5] = 1.0, 2.0, 2.0 - 5e-5
    trace = [TraceRequest(0, (1,), 2)]
    assert compare(trace, Served(outputs={0: got}), {0: answer([3, 4], logits=logits)}) == counts
