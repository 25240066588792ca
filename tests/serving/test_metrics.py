"""Metrics say what is so: every page has one place, counts are of what happened, a scrape sees no half step."""

import dataclasses
import math
import socket
import threading
import time
import urllib.request

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_generation import random_prompts, small_llm
from test_scheduler import PAGE, make, request, run_step

from engine.errors import ConfigError, IntegrityError
from engine.memory.pool_snapshot import snapshot_pool
from engine.serving.gate import Gate
from engine.serving.sampling_params import SamplingParams
from engine.serving.watch.board import SnapshotBoard
from engine.serving.watch.exporter import PREFIX, serve_metrics
from engine.serving.watch.latency import LatencyMetrics
from engine.serving.watch.metrics import collect_metrics
from engine.serving.watch.stats import EngineStats

FIELDS = dataclasses.fields(LatencyMetrics)


@pytest.fixture(scope="module")
def llm(llama):
    """A tight pool, so that requests are retracted and pages evicted."""
    return small_llm(llama, max_total_tokens=48, context_length=60)


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    return {(s.name.removeprefix(PREFIX), *s.labels.values()): s.value for f in families for s in f.samples}


def test_the_snapshot_counts_each_page_where_it_is():
    cache, scheduler = make(size=64, slots=3)
    prompt = np.arange(10, dtype=np.int32)
    scheduler.add(request(1, 0, prompt=prompt, new=1))
    run_step(scheduler)  # two full pages of it stay cached
    scheduler.add(request(2, 0, prompt=np.append(prompt, np.int32(9)), new=5))
    scheduler.add(request(3, 2, new=5))
    run_step(scheduler)
    metrics = collect_metrics(scheduler, EngineStats())
    pool = metrics.pool
    assert (pool.total_pages, pool.free_pages, pool.private_pages) == (16, 12, 2)  # the tails of 2 and 3
    assert (pool.locked_pages, pool.evictable_pages) == (2, 0)
    assert pool.usage == 4 / 16
    assert pool.tail_waste_tokens == 1 + 2
    assert [(r.request_id, r.tokens, r.pages, r.locked_pages) for r in metrics.requests] == [
        (2, 11, 3, 2),
        (3, 2, 1, 0),
    ]
    assert (metrics.running, metrics.waiting) == (2, 0)
    assert (metrics.prefix_cache.queried_tokens, metrics.prefix_cache.hit_tokens) == (10 + 11 + 2, 8)
    while scheduler.has_work:
        run_step(scheduler)
    pool = snapshot_pool(cache)
    assert (pool.private_pages, pool.locked_pages, pool.rows) == (0, 0, ())
    assert pool.free_pages + pool.evictable_pages == 16


def test_fragmentation_is_seen():
    cache, _ = make(size=64)
    assert (snapshot_pool(cache).free_runs, snapshot_pool(cache).largest_free_run_pages) == (1, 16)
    pages = cache.allocator.alloc(64)[::PAGE] // PAGE
    assert (snapshot_pool_runs(cache)) == (0, 0)
    cache.allocator.pages.release(np.concatenate([pages[0:2], pages[5:9], pages[15:]]))
    assert (snapshot_pool_runs(cache)) == (3, 4)


def snapshot_pool_runs(cache):
    """Pages that are held by no row are in no part, so the sum is not asked for here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(cache.page_table), "held_pages", lambda _: held_outside(cache))
        snapshot = snapshot_pool(cache)
    return snapshot.free_runs, snapshot.largest_free_run_pages


def held_outside(cache):
    every = np.arange(1, cache.allocator.pages.num_pages + 1, dtype=np.int32)
    return every[cache.allocator.pages.ref_count(every) > 0]


def test_a_lost_page_is_an_error_and_no_figure():
    cache, _ = make(size=64)
    cache.allocator.alloc(PAGE)  # held by no row and no cache of the manager
    with pytest.raises(IntegrityError, match="15 free, 0 private, 0 locked and 0 evictable pages are 15"):
        snapshot_pool(cache)


def test_a_request_that_is_retracted_and_admitted_again_queries_the_cache_once():
    cache, scheduler = make(size=48)
    for n in (1, 2, 3):
        scheduler.add(request(n, 8, new=30))
    while scheduler.has_work:
        run_step(scheduler)
    assert scheduler.retractions > 0
    assert (cache.prefix.query_tokens, cache.prefix.hit_tokens) == (24, 0)


def test_a_scrape_over_http_says_what_the_engine_says(llm):
    llm.reset_prefix_cache()
    before = llm.metrics()
    prompts = random_prompts([10, 12, 9, 11], seed=24)
    llm.generate(prompts, SamplingParams(max_new_tokens=20))
    llm.generate(prompts[:1], SamplingParams(max_new_tokens=1))
    with serve_metrics(llm.metrics, 0) as port:
        first = scrape(port)
        llm.reset_prefix_cache()
        second = scrape(port)
    metrics = llm.metrics()
    assert first["num_preemptions_total",] == metrics.retractions > before.retractions
    assert first["prefix_cache_queries_total",] - before.prefix_cache.queried_tokens == 10 + 12 + 9 + 11 + 10
    assert first["prefix_cache_hits_total",] == metrics.prefix_cache.hit_tokens
    assert first["request_success_total", "length"] - before.finished.get("length", 0) == 5
    assert first["generation_tokens_total",] == metrics.generation_tokens
    assert (first["num_requests_running",], first["num_requests_waiting",], first["kv_cache_usage_perc",]) == (0, 0, 0)
    states = ("free", "held", "cached_locked", "cached_evictable")
    for scraped in (first, second):
        assert sum(scraped["kv_pages", state] for state in states) == scraped["kv_pages_total_size",] == 12
    assert first["kv_pages", "cached_evictable"] > 0 == second["kv_pages", "cached_evictable"]
    assert all(second[key] >= value for key, value in first.items() if key[0].endswith("_total"))


def test_the_buckets_of_a_scraped_histogram_contain_those_below_and_count_what_the_engine_counted(llm):
    before = llm.metrics().latency
    outputs = llm.generate(random_prompts([10, 12, 9, 11], seed=26), SamplingParams(max_new_tokens=20, n=2))
    latency = llm.metrics().latency
    with serve_metrics(llm.metrics, 0) as port:
        scraped = scrape(port)
    for each in FIELDS:
        value, name = getattr(latency, each.name), each.name
        buckets = [(float(key[1]), count) for key, count in scraped.items() if key[0] == f"{name}_bucket"]
        assert [bound for bound, _ in buckets] == [*value.bounds, math.inf]
        assert [count for _, count in buckets] == np.cumsum(value.counts).tolist()
        assert scraped[f"{name}_count",] == buckets[-1][1] == value.count > 0
        assert scraped[f"{name}_sum",] == pytest.approx(value.sum)
    added = {each.name: getattr(latency, each.name).count - getattr(before, each.name).count for each in FIELDS}
    answers = 2 * len(outputs)
    assert added["time_to_first_token_seconds"] == added["e2e_request_latency_seconds"] == answers
    assert added["inter_token_latency_seconds"] == answers * (20 - 1)
    assert latency.request_generation_tokens.sum - before.request_generation_tokens.sum == answers * 20
    assert latency.request_prompt_tokens.sum - before.request_prompt_tokens.sum == 2 * (10 + 12 + 9 + 11)
    assert 0 < latency.time_to_first_token_seconds.sum < latency.e2e_request_latency_seconds.sum


def test_scrapes_during_steps_see_whole_steps_and_are_answered(llm):
    scraped, errors = [], []

    def scrape_on(port, done):
        try:
            while not done.is_set():
                scraped.append(scrape(port))
        except Exception as error:  # a failed scrape must fail the test, not its thread
            errors.append(error)

    done = threading.Event()
    with serve_metrics(llm.metrics, 0) as port:
        thread = threading.Thread(target=scrape_on, args=(port, done))
        thread.start()
        while len(scraped) < 3 and not errors:
            llm.generate(random_prompts([10, 12, 9, 11], seed=24), SamplingParams(max_new_tokens=20))
        done.set()
        thread.join()
    assert not errors
    running = [each["num_requests_running",] for each in scraped]
    assert all(each["kv_cache_usage_perc",] <= 1 for each in scraped)
    assert max(running) <= 4


def test_a_call_that_waits_goes_before_the_next_step_and_not_into_the_one_that_runs():
    gate, seen, state = Gate(), [], [0]
    inside = threading.Event()

    def call():
        inside.wait()
        with gate.entered():
            seen.append(state[0])

    thread = threading.Thread(target=call)
    thread.start()
    with gate.entered():
        state[0] = -1  # half a call
        inside.set()
        while not gate._turnstile.locked():
            pass
        with gate.entered():  # a call within the call does not wait
            state[0] = 1
    with gate.entered():
        state[0] = 2
    thread.join()
    assert seen == [1]


def test_readers_do_not_wait_for_the_call_that_runs_and_get_the_last_snapshot():
    gate, state = Gate(), [0]
    board = SnapshotBoard(lambda: state[0], gate, lambda: False)
    seen = []
    with gate.entered():
        state[0] = 1
        reader = threading.Thread(target=lambda: seen.append(board.read()))
        reader.start()
        reader.join(10)
        assert seen == [0]
    assert board.read() == 1


def test_a_busy_engine_makes_a_snapshot_where_one_is_wanted_and_not_for_every_reader():
    gate, made = Gate(), []

    def make():
        made.append(len(made))
        return made[-1]

    board = SnapshotBoard(make, gate, lambda: True)

    def read():
        seen = []
        reader = threading.Thread(target=lambda: seen.extend(board.read() for _ in range(2)))
        reader.start()
        reader.join()
        return seen

    with gate.entered():
        pass
    assert read() == [1, 1]  # no thread drives, so after a while the reader makes one snapshot itself
    with gate.entered():
        pass
    assert read()[-1] == made[-1] == 2
    done = threading.Event()
    readers = [threading.Thread(target=lambda: [board.read() for _ in iter(done.is_set, True)]) for _ in range(4)]
    for reader in readers:
        reader.start()
    begun = time.monotonic()
    while time.monotonic() < begun + 0.5:  # steps, many more than snapshots may be made
        with gate.entered():
            pass
    done.set()
    for reader in readers:
        reader.join()
    assert 3 < len(made) < 15
    assert board.read() == made[-1]  # the thread that drives sees its own last call


def test_readers_of_metrics_do_not_starve_the_engine(llm):
    """Four loops of readers beside a run: a lock that they took in turns made it stand still."""
    prompts, params = random_prompts([10, 12, 9, 11], seed=25), SamplingParams(max_new_tokens=20)
    llm.generate(prompts, params)
    done, read = threading.Event(), [0] * 4

    def loop(index):
        while not done.is_set():
            llm.metrics()
            read[index] += 1

    threads = [threading.Thread(target=loop, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    steps = llm.stats.steps
    llm.generate(prompts, params)
    done.set()
    for thread in threads:
        thread.join()
    assert llm.stats.steps - steps > 20
    assert min(read) > 0


@pytest.mark.parametrize(("port", "address"), [(70_000, "127.0.0.1"), (0, "203.0.113.1")])
def test_a_port_that_cannot_be_had_is_said_so(llm, port, address):
    with pytest.raises(ConfigError, match="cannot serve metrics on"), serve_metrics(llm.metrics, port, address):
        pass


def test_the_line_for_a_log_has_the_figures(llm):
    line = llm.metrics().describe()
    assert "Running: 0 reqs, Waiting: 0 reqs, KV cache usage: 0.0%" in line
    assert "of 12; tail waste: 0 tokens" in line
    assert "tokens hit" in line


def test_by_default_the_server_listens_to_this_machine_only(llm):
    with serve_metrics(llm.metrics, 0) as port, socket.socket() as probe:
        probe.bind(("127.0.0.2", port))  # would be refused if every address were taken
        assert scrape(port)


def test_an_address_of_the_sixth_version_is_served(llm):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    with serve_metrics(llm.metrics, 0, "::1") as port, urllib.request.urlopen(f"http://[::1]:{port}/") as answer:
        assert b"engine_kv_pages" in answer.read()
