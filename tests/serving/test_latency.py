"""Times to the first token, between tokens, in the queue and in all: exact by a clock that the tests set."""

import dataclasses
import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_support import CONTEXT, PAGE, request
from test_generation import CHUNK, random_prompts, small_llm

from engine.memory.manager import CacheManager
from engine.serving.groups import group_of
from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.replica import Replica
from engine.serving.plan.scheduler import Scheduler
from engine.serving.plan.token_times import TokenTimes
from engine.serving.recovery import MAX_TRIES
from engine.serving.request import FinishReason, RequestState
from engine.serving.sampling_params import SamplingParams
from engine.serving.watch.histogram import Histogram
from engine.serving.watch.latency import Latencies, LatencyMetrics

TIGHT = {"max_total_tokens": 48, "context_length": 60}
TICK = 1 / 64  # of this all sums are exact
QUIET = dict.fromkeys((each.name for each in dataclasses.fields(LatencyMetrics)), ())


class Boom(Exception):
    """What an injected fault raises."""


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def timed_llm(llama, **options):
    llm = small_llm(llama, **options)
    llm.stats.clock = Clock()
    return llm


@pytest.fixture(scope="module")
def engines(llama):
    """A tight pool, so that requests are retracted; steps that overlap and steps that do not."""
    return {overlap: timed_llm(llama, **TIGHT, overlap_steps=overlap) for overlap in (False, True)}


@pytest.fixture(params=[False, True], ids=["in turn", "overlapped"])
def llm(engines, request):
    llm = engines[request.param]
    llm.reset_prefix_cache()
    return llm


def check(before, after, **expected):
    """The values that were observed between two snapshots are these, in any order, and no others."""
    for name, values in {**QUIET, **expected}.items():
        if values is ...:
            continue
        old, new = getattr(before, name), getattr(after, name)
        counts = np.array(new.counts) - np.array(old.counts)
        np.testing.assert_array_equal(counts, counts_of(values, new.bounds), err_msg=f"{name}: {values}")
        assert new.sum - old.sum == pytest.approx(math.fsum(values), abs=1e-9), name


def counts_of(values, bounds):
    """How many values lie in each bucket, by the rule that a bucket contains its upper bound."""
    edges = [-np.inf, *bounds, np.inf]
    return [sum(low < value <= high for value in values) for low, high in itertools.pairwise(edges)]


STEPS = {"iteration_tokens_total": ..., "step_time_seconds": ...}


def advance_to(llm, start, *times):
    """One step at each of these times after ``start``."""
    for time in times:
        llm.stats.clock.now = start + time
        llm.step()


@given(
    bounds=st.lists(st.integers(-50, 50), min_size=1, max_size=9, unique=True).map(sorted),
    values=st.lists(st.integers(-200, 200).map(lambda number: number / 4), max_size=40),
    times=st.integers(1, 300),
)
def test_a_histogram_counts_as_plain_comparison_does(bounds, values, times):
    one_by_one, at_once = Histogram(bounds), Histogram(bounds)
    for value in values:
        one_by_one.observe(value, times)
    one_by_one.observe(math.nan, times)
    for _ in range(times if len(values) < 5 else 1):
        at_once.observe_all(np.array(values, np.float64))
    snapshot, right = one_by_one.snapshot(), np.array(counts_of(values, bounds))
    assert snapshot.counts == tuple(times * right)
    assert (snapshot.sum, snapshot.count) == (times * sum(values), times * len(values))
    assert snapshot.bounds == tuple(bounds)
    assert at_once.snapshot().counts == tuple((times if len(values) < 5 else 1) * right)
    assert one_by_one.snapshot() == snapshot


def test_a_snapshot_stays_as_it_is_when_more_is_counted():
    histogram = Histogram((1.0, 2.0))
    histogram.observe(1.0)
    snapshot = histogram.snapshot()
    histogram.observe(3.0, 5)
    histogram.observe_all(np.array([0.5, 1.5]))
    assert (snapshot.counts, snapshot.sum) == ((1, 0, 0), 1.0)
    assert (histogram.snapshot().counts, histogram.snapshot().sum) == ((2, 1, 5), 18.0)


def test_the_moments_of_one_request_whose_prompt_takes_two_steps(engines):
    (prompt,) = random_prompts([CHUNK + 8], seed=5)
    at = {False: (1, 2, 4, 7), True: (0.5, 1, 2, 4, 7)}  # overlapped, what was dispatched before is committed
    for overlap, llm in engines.items():
        llm.reset_prefix_cache()
        start, before = llm.stats.clock.now, llm.metrics().latency
        llm.add_request(prompt, SamplingParams(max_new_tokens=3))
        advance_to(llm, start, *at[overlap])
        assert not llm.scheduler.has_work
        admitted = at[overlap][0]
        steps = [0.0] * 4 if not overlap else [0.5, 1.0, 2.0, 3.0]
        check(
            before,
            llm.metrics().latency,
            time_to_first_token_seconds=[2],
            inter_token_latency_seconds=[2, 3],
            e2e_request_latency_seconds=[7],
            request_queue_time_seconds=[admitted],
            request_prefill_time_seconds=[2 - admitted],
            request_decode_time_seconds=[5],
            request_time_per_output_token_seconds=[2.5],
            request_prompt_tokens=[CHUNK + 8],
            request_generation_tokens=[3],
            iteration_tokens_total=[CHUNK, 8, 1, 1],
            step_time_seconds=steps,
        )


def test_a_request_waits_from_its_arrival_and_one_that_arrived_earlier_from_then(engines):
    llm = engines[False]
    start, before = llm.stats.clock.now, llm.metrics().latency
    (early, late) = random_prompts([5, 6], seed=6)
    llm.add_request(early, SamplingParams(max_new_tokens=1))
    request_id = llm.add_request(late, SamplingParams(max_new_tokens=1))
    llm._groups.unfinished[request_id].times.arrived -= 8  # a server that had it before
    advance_to(llm, start, 3)
    check(
        before,
        llm.metrics().latency,
        **STEPS,
        time_to_first_token_seconds=[3, 11],
        e2e_request_latency_seconds=[3, 11],
        request_queue_time_seconds=[3, 11],
        request_prefill_time_seconds=[0, 0],
        request_decode_time_seconds=[0, 0],
        request_prompt_tokens=[5, 6],
        request_generation_tokens=[1, 1],
    )


def test_each_answer_to_a_prompt_has_its_times_and_siblings_do_not_queue(engines):
    llm = engines[False]
    start, before = llm.stats.clock.now, llm.metrics().latency
    (prompt,) = random_prompts([9], seed=7)
    llm.add_request(prompt, SamplingParams(max_new_tokens=2, n=3, temperature=1.0))
    advance_to(llm, start, 1, 3, 4)  # the siblings compute the last token of the prompt at 3
    assert not llm.scheduler.has_work
    check(
        before,
        llm.metrics().latency,
        **STEPS,
        time_to_first_token_seconds=[1, 3, 3],
        inter_token_latency_seconds=[2, 1, 1],
        e2e_request_latency_seconds=[3, 4, 4],
        request_queue_time_seconds=[1],
        request_prefill_time_seconds=[0, 2, 2],
        request_decode_time_seconds=[2, 1, 1],
        request_time_per_output_token_seconds=[2, 1, 1],
        request_prompt_tokens=[9, 9, 9],
        request_generation_tokens=[2, 2, 2],
    )


def test_an_aborted_answer_counts_what_it_had_and_not_as_a_whole(engines):
    llm = engines[False]
    start, before = llm.stats.clock.now, llm.metrics()
    prompts = random_prompts([6, 7], seed=8)
    first = llm.add_request(prompts[0], SamplingParams(max_new_tokens=9))
    advance_to(llm, start, 1, 2, 4)
    waiting = llm.add_request(prompts[1], SamplingParams(max_new_tokens=9))
    llm.abort(first)
    llm.abort(waiting)
    assert llm.metrics().finished["abort"] - before.finished.get("abort", 0) == 2
    check(
        before.latency,
        llm.metrics().latency,
        **STEPS,
        time_to_first_token_seconds=[1],
        inter_token_latency_seconds=[1, 2],
        request_queue_time_seconds=[1],
    )


def test_a_request_that_is_retracted_queues_once_and_its_pause_lies_between_two_tokens(llm):
    start, before = llm.stats.clock.now, llm.metrics()
    prompts = random_prompts([10, 12, 9, 11], seed=24)
    requests = [add(llm, prompt, SamplingParams(max_new_tokens=20)) for prompt in prompts]
    seen = Watcher(llm, requests)
    while llm.scheduler.has_work:
        seen.step(1)
    assert llm.metrics().retractions > before.retractions
    assert max(seen.gaps()) > 2
    seen.check(before.latency)
    assert llm.stats.clock.now > start


def test_a_failed_step_is_part_of_the_time_between_two_tokens(llm, monkeypatch):
    before = llm.metrics().latency
    requests = [add(llm, prompt, SamplingParams(max_new_tokens=8)) for prompt in random_prompts([7, 8], seed=9)]
    seen = Watcher(llm, requests)
    while any(len(each.output) < 3 for each in requests):
        seen.step(1)
    with monkeypatch.context() as patched:
        patched.setattr(llm._runner, "step", raise_boom)
        with pytest.raises(Boom):
            seen.step(5)
    while llm.scheduler.has_work:
        seen.step(1)
    assert max(seen.gaps()) > 5
    seen.check(before)


def test_a_step_that_repeats_costs_no_array_work(llm, monkeypatch):
    for prompt in random_prompts([3, 4, 5], seed=10):
        add(llm, prompt, SamplingParams(max_new_tokens=7))
    calls = defaultdict(int)
    for name in ("note", "note_repeat", "_settle"):
        count_calls(monkeypatch, calls, name)
    while llm.scheduler.has_work:
        llm.step()
    assert calls["note_repeat"] >= 4
    assert calls["note"] <= 3


def count_calls(monkeypatch, calls, name):
    original = getattr(TokenTimes, name)

    def counting(*arguments):
        calls[name] += 1
        return original(*arguments)

    monkeypatch.setattr(TokenTimes, name, counting)


def raise_boom(*_):
    raise Boom


def add(llm, prompt, params):
    return llm._groups.unfinished[llm.add_request(prompt, params)]


class Watcher:
    """Sees from outside when requests get tokens and pages, and says what the histograms must have."""

    def __init__(self, llm, leaders=()):
        self.llm = llm
        self.arrived, self.tokens, self.queued, self.started = {}, defaultdict(list), {}, {}
        for leader in leaders:
            self.add(leader)

    def add(self, leader):
        now = self.llm.stats.clock.now
        self.arrived.update(dict.fromkeys(group_of(leader), now))
        self.queued[leader] = None

    def step(self, seconds):
        self.llm.stats.clock.now += seconds
        try:
            return self.llm.step()
        finally:
            self.look()

    def look(self):
        now = self.llm.stats.clock.now
        for each in self.arrived:
            self.tokens[each] += [now] * (len(each.output) - len(self.tokens[each]))
            if each.state is RequestState.WAITING and each.cached_tokens is None:  # also a sibling without room
                self.queued.setdefault(each, None)
            elif each in self.queued and self.queued[each] is None and each.cached_tokens is not None:
                self.queued[each] = now
            if each.cached_tokens is not None:
                self.started.setdefault(each, now)

    def gaps(self):
        return [gap for times in self.tokens.values() for gap in np.diff(times).tolist()]

    def check(self, before):
        complete = [e for e in self.arrived if e.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)]
        tokens, arrived = self.tokens, self.arrived
        queued = {each: at for each, at in self.queued.items() if at is not None}
        several = [each for each in complete if len(each.output) > 1]
        check(
            before,
            self.llm.metrics().latency,
            **STEPS,
            time_to_first_token_seconds=[times[0] - arrived[each] for each, times in tokens.items() if times],
            inter_token_latency_seconds=self.gaps(),
            e2e_request_latency_seconds=[tokens[each][-1] - arrived[each] for each in complete],
            request_queue_time_seconds=[at - arrived[each] for each, at in queued.items()],
            request_prefill_time_seconds=[tokens[each][0] - self.started[each] for each in complete],
            request_decode_time_seconds=[tokens[each][-1] - tokens[each][0] for each in complete],
            request_time_per_output_token_seconds=[np.diff(tokens[each]).mean() for each in several],
            request_prompt_tokens=[len(each.prompt) for each in complete],
            request_generation_tokens=[len(each.output) for each in complete],
        )


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(overlap=st.booleans(), seed=st.integers(0, 2**31))
def test_random_traffic_is_counted_as_it_is_seen_from_outside(engines, overlap, seed):
    """Retractions, several answers, aborts, prompts in chunks, idle times and failed steps."""
    llm, rng = engines[overlap], np.random.default_rng(seed)
    llm.reset_prefix_cache()
    before, watcher, step, faults = llm.metrics(), Watcher(llm), llm._runner.step, 0
    for _ in range(60):
        action = rng.random()
        if action < 0.25:
            new, n = int(rng.integers(1, 13)), int(rng.choice([1, 1, 1, 2, 3]))
            (prompt,) = random_prompts([int(rng.integers(1, CHUNK + 5))], seed=int(rng.integers(2**31)))
            watcher.add(add(llm, prompt, SamplingParams(max_new_tokens=new, n=n, temperature=1.0)))
        elif action < 0.3 and llm._groups.unfinished:
            llm.abort(int(rng.choice(list(llm._groups.unfinished))))
            watcher.look()
        elif action < 0.36 and llm.scheduler.has_work and faults < MAX_TRIES - 1:  # so that no request ends for it
            faults += 1
            llm._runner.step = raise_boom
            try:
                watcher.step(TICK)
            except Boom:
                pass
            finally:
                llm._runner.step = step
        else:
            watcher.step(TICK * int(rng.integers(1, 300)))
    while llm.scheduler.has_work:
        watcher.step(TICK * int(rng.integers(1, 300)))
    watcher.check(before.latency)
    after = llm.metrics()
    complete = [metrics.finished.get("stop", 0) + metrics.finished.get("length", 0) for metrics in (before, after)]
    whole = [metrics.latency.e2e_request_latency_seconds.count for metrics in (before, after)]
    assert whole[1] - whole[0] == complete[1] - complete[0]
    assert after.latency.step_time_seconds.count == after.latency.iteration_tokens_total.count == after.steps
    assert after.latency.iteration_tokens_total.sum == after.prompt_tokens + after.generation_tokens


@settings(max_examples=15, deadline=None)
@given(replicas=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_the_time_between_tokens_is_that_of_each_request_on_any_replica(replicas, seed):
    """On the host alone, with tokens that could not be chosen, and requests that end from outside."""
    rng, queue, now, number = np.random.default_rng(seed), RequestQueue(), 0.0, 0
    caches = [CacheManager(56, PAGE, 3, CONTEXT, policy="lru") for _ in range(replicas)]
    options = {"max_running_requests": 3, "max_step_tokens": 16}
    members = [Replica(cache, queue, index=index, **options) for index, cache in enumerate(caches)]
    scheduler, latencies, requests = Scheduler(members, queue, lambda: now), Latencies(), []
    times = defaultdict(list)
    for _ in range(120):
        if rng.random() < 0.1 * replicas and number < 12:
            number += 1
            requests.append(request(number, int(rng.integers(1, 25)), new=int(rng.integers(1, 30))))
            scheduler.add(requests[-1])
            latencies.note_arrival(requests[-1:], now)
        if rng.random() < 0.03 and scheduler.running:
            scheduler.end(scheduler.running[0], FinishReason.ABORT)
        step, finished = scheduler.next_step(), []
        if not step.num_tokens:
            continue
        tokens = np.where(rng.random(3 * replicas) < 0.01, -1, 7).astype(np.int32)
        now += TICK * int(rng.integers(1, 300))
        gained = scheduler.commit(step, tokens, finished)
        latencies.note_admitted(step.admitted, now)
        latencies.note_step(members, step, gained, finished, now)
        for each in requests:
            times[each] += [now] * (len(each.output) - len(times[each]))
    snapshot, gaps = latencies.snapshot(), [gap for each in times.values() for gap in np.diff(each).tolist()]
    itl = snapshot.inter_token_latency_seconds
    assert (itl.sum, list(itl.counts)) == (sum(gaps), counts_of(gaps, itl.bounds))
    assert snapshot.time_to_first_token_seconds.count == sum(map(bool, times.values()))
    assert snapshot.request_queue_time_seconds.count == sum(each.cached_tokens is not None for each in requests)
