"""The scheduler on the host alone: a pretend model, real pages."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import KVPoolExhausted, RequestTooLarge, ShapeError
from engine.memory.cache_manager import CacheManager
from engine.serving.batcher import Batcher, token_buckets
from engine.serving.request import FinishReason, Request, SamplingParams
from engine.serving.scheduler import Scheduler

PAGE, CONTEXT = 4, 64


def make(size=64, slots=3, budget=16):
    cache = CacheManager(size, PAGE, slots, CONTEXT)
    return cache, Scheduler(cache, max_running_requests=slots, max_step_tokens=budget)


def request(number, prompt_len, new=4):
    prompt = np.arange(prompt_len, dtype=np.int32) + 100 * number
    return Request(number, prompt, SamplingParams(max_new_tokens=new), frozenset())


def run_step(scheduler):
    step = scheduler.next_step()
    return step, scheduler.commit(step, np.zeros(len(step.rows) + 2, np.int32))


def test_decoding_requests_come_first_and_a_long_prompt_takes_the_rest_in_chunks():
    _, scheduler = make()
    scheduler.add(request(1, 3))
    run_step(scheduler)
    scheduler.add(request(2, 40))
    for expected in (15, 15, 10):
        step, _ = run_step(scheduler)
        assert [(row.request.request_id, row.count) for row in step.rows] == [(1, 1), (2, expected)]


def test_only_the_chunk_that_ends_a_prompt_samples():
    _, scheduler = make()
    long = request(1, 40)
    scheduler.add(long)
    lengths = []
    for _ in range(4):
        run_step(scheduler)
        lengths.append(len(long.output))
    assert lengths == [0, 0, 1, 2]


def test_the_queue_is_never_overtaken():
    _, scheduler = make(size=32)
    for number, length in enumerate([20, 20, 2], start=1):
        scheduler.add(request(number, length))
    first, _ = run_step(scheduler)
    assert [row.request.request_id for row in first.rows] == [1]  # 3 would fit, but 2 waits before it


def test_admission_promises_every_page_a_request_may_need():
    cache, scheduler = make(size=32)
    scheduler.add(request(1, 4, new=20))  # 23 tokens of KV: 24 in whole pages
    scheduler.add(request(2, 6, new=4))  # 9 tokens: 12
    run_step(scheduler)
    assert len(scheduler.running) == 1
    assert cache.held_tokens == 4
    while scheduler.has_work:
        run_step(scheduler)  # never raises KVPoolExhausted
    assert cache.held_tokens == 0


def test_a_request_larger_than_the_pool_is_refused_at_the_door():
    _, scheduler = make(size=32)
    with pytest.raises(
        RequestTooLarge, match="needs 36 tokens of KV in whole pages, the pool has 32; shorten the prompt"
    ):
        scheduler.add(request(1, 33, new=1))
    scheduler.add(request(1, 32, new=1))
    assert not run_step(scheduler)[1] or scheduler.has_work


def test_the_cache_manager_refuses_what_it_cannot_promise():
    cache, _ = make(size=32)
    cache.admit(30)
    with pytest.raises(KVPoolExhausted, match="cannot promise 4 tokens: 0 of 32") as caught:
        cache.admit(1)
    assert (caught.value.requested, caught.value.available) == (4, 0)
    cache.check_integrity()


@pytest.mark.parametrize("stage", ["waiting", "prefilling", "decoding", "finished"])
def test_an_abort_at_any_moment_gives_back_every_page(stage):
    cache, scheduler = make(slots=1)
    target = request(1, 30, new=2)
    if stage == "waiting":
        scheduler.add(request(2, 4))
    scheduler.add(target)
    for _ in range({"waiting": 1, "prefilling": 1, "decoding": 2, "finished": 3}[stage]):
        run_step(scheduler)
    scheduler.abort(target)
    assert target.finish_reason is (FinishReason.LENGTH if stage == "finished" else FinishReason.ABORT)
    while scheduler.has_work:
        run_step(scheduler)
    cache.check_integrity()
    assert cache.held_tokens == 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.large_base_example, HealthCheck.too_slow])
@given(st.data())
def test_every_request_finishes_and_no_step_breaks_a_rule(data):
    size = data.draw(st.sampled_from([16, 32, 64, 128]), label="size")
    slots, budget = data.draw(st.integers(1, 4), label="slots"), data.draw(st.integers(1, 24), label="budget")
    cache, scheduler = make(size, slots, budget)
    batcher = Batcher(cache, slots, scheduler.max_step_tokens)
    waiting = [
        request(n, data.draw(st.integers(1, min(size, CONTEXT) - 8)), data.draw(st.integers(1, 8))) for n in range(1, 7)
    ]
    requests = list(waiting)
    written: dict[int, tuple[int, int]] = {}
    while waiting or scheduler.has_work:
        if waiting and data.draw(st.booleans(), label="arrives"):
            scheduler.add(waiting.pop(0))
        if scheduler.has_work:
            step = scheduler.next_step()
            check_step(step, batcher, slots, written)
            scheduler.commit(step, np.zeros(slots, np.int32))
            cache.check_integrity()
    assert all(r.finish_reason is FinishReason.LENGTH for r in requests)
    assert cache.held_tokens == 0


def check_step(step, batcher, slots, written):
    """Each parcel row leads through its pages to exactly the slots where its tokens were written."""
    parcel, shape = batcher.fill(step)
    total = sum(row.count for row in step.rows)
    assert 1 <= total <= shape.tokens
    assert 1 <= len(step.rows) <= slots
    assert parcel.cu_q_lens[-1] == total
    assert (parcel.out_cache_loc[total:] == -1).all()
    assert len(set(step.out_cache_loc.tolist())) == total
    for index, row in enumerate(step.rows):
        start, stop = parcel.cu_q_lens[index], parcel.cu_q_lens[index + 1]
        positions = parcel.positions[start:stop]
        np.testing.assert_array_equal(positions, np.arange(row.start, row.start + row.count))
        np.testing.assert_array_equal(parcel.token_ids[start:stop], row.tokens())
        for position, slot in zip(positions.tolist(), parcel.out_cache_loc[start:stop].tolist(), strict=True):
            written[slot] = (row.request.request_id, position)
        assert parcel.kv_lens[index] == row.start + row.count
        for position in range(parcel.kv_lens[index]):
            slot = int(parcel.page_table[index, position // PAGE]) * PAGE + position % PAGE
            assert written[slot] == (row.request.request_id, position)
    assert (parcel.kv_lens[len(step.rows) :] == 0).all()


@given(slots=st.integers(1, 300), budget=st.integers(1, 5000))
def test_buckets_begin_at_the_decode_batch_end_at_the_budget_and_at_most_double(slots, budget):
    budget = max(slots, budget)
    buckets = token_buckets(slots, budget)
    assert (buckets[0], buckets[-1]) == (slots, budget)
    assert all(a < b <= 2 * a for a, b in itertools.pairwise(buckets))


def test_tokens_are_read_across_the_end_of_the_prompt():
    r = request(0, 4)
    r.output += [50, 51, 52]
    assert r.tokens(2, 6).tolist() == [2, 3, 50, 51]
    assert r.tokens(4, 7).tolist() == [50, 51, 52]
    assert r.tokens(0, 4).tolist() == [0, 1, 2, 3]


def test_a_row_that_would_outgrow_the_context_is_refused_and_nothing_changes():
    cache, _ = make()
    row = np.array([cache.admit(8)], np.int32)
    cache.grow(row, np.array([7], np.int32))
    before = cache.held_tokens, cache.page_table.kv_lens(row).tolist()
    with pytest.raises(ShapeError, match=f"would grow to {CONTEXT + 1} tokens; a row holds at most {CONTEXT}"):
        cache.grow(row, np.array([CONTEXT - 6], np.int32))
    assert (cache.held_tokens, cache.page_table.kv_lens(row).tolist()) == before
    cache.check_integrity()


@pytest.mark.parametrize(("twice", "counts"), [(True, [4, 4]), (False, [4]), (False, [4, -1])])
def test_a_refused_growth_takes_no_page(twice, counts):
    cache, _ = make()
    first, second = cache.admit(16), cache.admit(16)
    rows = np.array([first, first if twice else second], np.int32)
    with pytest.raises(ShapeError, match="give distinct rows, a count for each"):
        cache.grow(rows, np.array(counts, np.int32))
    assert cache.held_tokens == 0
    cache.check_integrity()


@pytest.mark.parametrize("tokens", [0, -100, CONTEXT + 1])
def test_only_what_a_request_can_have_is_promised(tokens):
    cache, _ = make(size=128)
    with pytest.raises(ShapeError, match=f"cannot promise {tokens} tokens"):
        cache.admit(tokens)


def test_a_step_that_did_not_run_is_taken_back():
    cache, scheduler = make()
    for number in (1, 2):
        scheduler.add(request(number, 10))
    run_step(scheduler)
    scheduler.undo(scheduler.next_step())
    assert [r.request_id for r in scheduler.waiting] == [1, 2]
    assert [r.num_computed for r in scheduler.waiting] == [0, 0]
    assert cache.held_tokens == 0
    cache.check_integrity()
    while scheduler.has_work:
        run_step(scheduler)
    cache.check_integrity()
