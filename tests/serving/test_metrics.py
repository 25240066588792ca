"""Metrics say what is so: every page has one place, counts are of what happened, a scrape sees no half step."""

import threading
import urllib.request

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_generation import random_prompts, small_llm
from test_scheduler import PAGE, make, request, run_step

from engine.errors import ConfigError, IntegrityError
from engine.memory.pool_snapshot import snapshot_pool
from engine.serving.exporter import PREFIX, serve_metrics
from engine.serving.gate import Gate
from engine.serving.metrics import collect_metrics
from engine.serving.request import SamplingParams
from engine.serving.stats import EngineStats


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
    cache.allocator.release(np.concatenate([pages[0:2], pages[5:9], pages[15:]]))
    assert (snapshot_pool_runs(cache)) == (3, 4)


def snapshot_pool_runs(cache):
    """Pages that are held by no row are in no part, so the sum is not asked for here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(cache.page_table), "held_pages", lambda _: held_outside(cache))
        snapshot = snapshot_pool(cache)
    return snapshot.free_runs, snapshot.largest_free_run_pages


def held_outside(cache):
    every = np.arange(1, cache.allocator.num_pages + 1, dtype=np.int32)
    return every[cache.allocator.ref_count(every) > 0]


def test_a_lost_page_is_an_error_and_no_figure():
    cache, _ = make(size=64)
    cache.allocator.alloc(PAGE)  # held by nobody that the manager knows
    with pytest.raises(IntegrityError, match="15 free, 0 private, 0 locked and 0 evictable pages are 15"):
        snapshot_pool(cache)


def test_who_is_retracted_and_comes_back_queries_the_cache_once():
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
    assert first["num_preemptions_total",] == metrics.preemptions > before.preemptions
    assert first["prefix_cache_queries_total",] - before.prefix_cache.queried_tokens == 10 + 12 + 9 + 11 + 10
    assert first["prefix_cache_hits_total",] == metrics.prefix_cache.hit_tokens
    assert first["requests_finished_total", "length"] - before.finished.get("length", 0) == 5
    assert first["generation_tokens_total",] == metrics.generation_tokens
    assert (first["num_requests_running",], first["num_requests_waiting",], first["kv_cache_usage_perc",]) == (0, 0, 0)
    states = ("free", "held", "cached_locked", "cached_evictable")
    for scraped in (first, second):
        assert sum(scraped["kv_pages", state] for state in states) == scraped["kv_pages_total_size",] == 12
    assert first["kv_pages", "cached_evictable"] > 0 == second["kv_pages", "cached_evictable"]
    assert all(second[key] >= value for key, value in first.items() if key[0].endswith("_total"))


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


def test_who_looks_goes_before_the_next_call_and_not_into_the_one_that_runs():
    gate, seen, state = Gate(), [], [0]
    inside = threading.Event()

    def look():
        inside.wait()
        with gate.looking():
            seen.append(state[0])

    thread = threading.Thread(target=look)
    thread.start()
    with gate:
        state[0] = -1  # half a call
        inside.set()
        while not gate._lookers:
            pass
        with gate:  # a call within the call does not wait for who looks
            state[0] = 1
    with gate:
        state[0] = 2
    thread.join()
    assert seen == [1]


@pytest.mark.parametrize(("port", "address"), [(70_000, "127.0.0.1"), (0, "203.0.113.1")])
def test_a_port_that_cannot_be_had_is_said_so(llm, port, address):
    with pytest.raises(ConfigError, match="cannot serve metrics on"), serve_metrics(llm.metrics, port, address):
        pass


def test_the_line_for_a_log_has_the_figures(llm):
    line = llm.metrics().describe()
    assert "Running: 0 reqs, Waiting: 0 reqs, KV cache usage: 0.0%" in line
    assert "of 12; tail waste: 0 tokens" in line
    assert "tokens hit" in line
