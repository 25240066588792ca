"""Requests that begin alike and come together: one computes what they share, the others wait for it."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_support import PAGE, SCOPE, Clock, PretendDevice, check_step, commit, make, request, run_step

from engine.memory.manager import CacheManager
from engine.serving.device.batcher import parcel_shapes
from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.replica import Replica
from engine.serving.plan.scheduler import Scheduler
from engine.serving.request import FinishReason, Request, RequestState
from engine.serving.sampling_params import SamplingParams


def make_large(page_size, *, slots=8, budget=1024, policy="lru"):
    cache, queue = CacheManager(2048, page_size, slots, 256, policy=policy), RequestQueue()
    return cache, Scheduler([Replica(cache, queue, max_running_requests=slots, max_step_tokens=budget)], queue, Clock())


def add(scheduler, prompts, new=4):
    requests = [
        Request(number, prompt, SamplingParams(max_new_tokens=new), frozenset(), SCOPE)
        for number, prompt in enumerate(prompts)
    ]
    for each in requests:
        scheduler.add(each)
    return requests


def prefill(scheduler, requests, overlap):
    """Runs steps until every request has a token; returns the prompt tokens that were fed."""
    fed, flights = 0, []
    while not all(each.output for each in requests):
        step = scheduler.next_step(settled=not flights)
        if step.requests:
            fed += step.num_tokens - step.num_decode_tokens
            flights.append(step)
        if flights and (len(flights) > overlap or not step.requests):
            landed = flights.pop(0)
            commit(scheduler, landed, np.full(len(landed.rows) + 2, 7, np.int32))
    for landed in flights:
        commit(scheduler, landed, np.full(len(landed.rows) + 2, 7, np.int32))
    return fed


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("budget", [1024, 40])
def test_eight_prompts_with_a_common_beginning_compute_it_once(overlap, budget):
    cache, scheduler = make_large(16, budget=budget)
    common = np.arange(96, dtype=np.int32)
    requests = add(scheduler, [np.append(common, [1000 + n, 2000 + n]).astype(np.int32) for n in range(8)])
    assert prefill(scheduler, requests, overlap) == 96 + 8 * 2  # of 784 tokens
    assert [each.cached_tokens for each in requests] == [0] + [96] * 7
    assert (cache.prefix.query_tokens, cache.prefix.hit_tokens) == (8 * 98, 7 * 96)
    while scheduler.has_work:
        run_step(scheduler)
        cache.check_integrity()
    assert cache.held_tokens == 0


def test_equal_prompts_share_all_pages_but_that_of_the_last_token():
    cache, scheduler = make_large(16)
    requests = add(scheduler, [np.arange(64, dtype=np.int32)] * 8)
    most = 0

    def pages_of_prompts():
        pages = cache.page_table.rows([each.req_pool_idx for each in requests if each.req_pool_idx is not None])[:, :4]
        return np.unique(pages[pages > 0]).size

    while not all(each.output for each in requests):
        step = scheduler.next_step()
        most = max(most, pages_of_prompts())
        commit(scheduler, step, np.full(10, 7, np.int32))
        cache.check_integrity()
    assert most == 4 + 7  # not 32
    assert pages_of_prompts() == 4  # the last page is shared too, once it is full


def test_without_a_prefix_cache_none_waits():
    _, scheduler = make_large(16, policy=None)
    requests = add(scheduler, [np.arange(64, dtype=np.int32)] * 3)
    step, _ = run_step(scheduler)
    assert [row.count for row in step.rows] == [64] * 3
    assert all(each.output for each in requests)


@pytest.mark.parametrize("ends", ["abort", "retract", "reset"])
def test_where_the_request_that_computes_goes_the_others_go_on_themselves(ends):
    cache, scheduler = make_large(16, budget=150)
    prompt = np.arange(100, dtype=np.int32)
    first, second, third = add(scheduler, [prompt, np.append(prompt, np.int32(5)), np.append(prompt, np.int32(6))])
    step = scheduler.next_step()
    assert step.requests == [first]
    assert {each.state for each in (second, third)} == {RequestState.RUNNING}
    if ends == "abort":
        scheduler.end(first, FinishReason.ABORT)
    elif ends == "retract":
        scheduler.replicas[0]._retract(first)
    else:
        cache.reset_prefix_cache()
    commit(scheduler, step, np.full(8, 7, np.int32))
    while scheduler.has_work:
        run_step(scheduler)
        cache.check_integrity()
    assert [len(each.output) for each in (second, third)] == [4, 4]
    assert first.finish_reason is (FinishReason.ABORT if ends == "abort" else FinishReason.LENGTH)
    assert cache.held_tokens == 0


def test_a_request_that_comes_back_counts_no_second_hit():
    """It waits for another one again, as after a fault that has taken every step back."""
    cache, scheduler = make_large(16)
    common = np.arange(64, dtype=np.int32)
    requests = add(scheduler, [np.append(common, np.int32(1000 + n)) for n in range(2)])
    run_step(scheduler)
    scheduler.next_step()
    assert requests[1].cached_tokens == 64
    scheduler.restart(requests, keeps_pages=False)
    prefill(scheduler, requests, overlap=False)
    assert [each.cached_tokens for each in requests] == [0, 64]
    assert (cache.prefix.query_tokens, cache.prefix.hit_tokens) == (2 * 65, 64)


def test_the_end_of_one_that_waits_ends_no_other_wait():
    """All wait for the one that computes, not each for the one before it."""
    _, scheduler = make_large(16, budget=256)
    prompt = np.arange(200, dtype=np.int32)
    first, second, third = add(scheduler, [prompt] * 3)
    step = scheduler.next_step()
    scheduler.end(second, FinishReason.ABORT)
    commit(scheduler, step, np.full(8, 7, np.int32))
    assert prefill(scheduler, [first, third], overlap=False) == 200 - 192
    assert third.cached_tokens == 192


def test_a_request_waits_again_where_another_computes_more_of_its_tokens():
    """The second and the third share more with each other than with the first."""
    _, scheduler = make_large(16, budget=1024)
    trunk, branch = np.arange(64, dtype=np.int32), np.arange(500, 564, dtype=np.int32)
    tails = [np.array([n], np.int32) for n in (900, 901)]
    prompts = [np.append(trunk, tails[0]), *(np.concatenate([trunk, branch, tail]) for tail in tails)]
    requests = add(scheduler, prompts)
    assert prefill(scheduler, requests, overlap=False) == 65 + (64 + 1) + 1


def test_one_that_shares_less_than_a_page_does_not_wait():
    _, scheduler = make_large(16)
    one, other = np.arange(40, dtype=np.int32), np.arange(40, dtype=np.int32)
    other[15:] += 500
    add(scheduler, [one, other])
    step, _ = run_step(scheduler)
    assert [row.count for row in step.rows] == [40, 40]


def test_a_prompt_under_way_is_waited_for_by_one_that_comes_later():
    _, scheduler = make_large(16, budget=32)
    prompt = np.arange(160, dtype=np.int32)
    (first,) = add(scheduler, [prompt])
    run_step(scheduler)
    late = request(9, 0, prompt=np.append(prompt, np.int32(1)))
    scheduler.add(late)
    fed = 32
    while not late.output:
        step, _ = run_step(scheduler)
        fed += step.num_tokens - step.num_decode_tokens
    assert fed == 160 + 1
    assert late.cached_tokens == 160
    assert first.output


@settings(max_examples=20, suppress_health_check=[HealthCheck.large_base_example, HealthCheck.too_slow])
@given(st.data())
def test_whatever_they_share_every_parcel_leads_to_the_right_tokens(data):
    """Few token values and few lengths, so that prompts begin alike in every way; overlapped, aborted, retracted."""
    size, slots = data.draw(st.sampled_from([48, 64, 160]), label="size"), data.draw(st.integers(2, 5), label="slots")
    cache, scheduler = make(size, slots, data.draw(st.sampled_from([4, 9, 64]), label="budget"))
    device = PretendDevice(cache.page_table, parcel_shapes(slots, scheduler.max_step_tokens, PAGE))
    trunk = np.arange(40, dtype=np.int32)
    coming, written, flights = [], {}, []
    for number in range(1, 9):
        length, own = data.draw(st.sampled_from([1, 8, 12, 17, 24, 33])), data.draw(st.integers(0, 6))
        tail = np.arange(own, dtype=np.int32) + data.draw(st.sampled_from([100, 200]))
        coming.append(request(number, 0, data.draw(st.integers(1, 6)), prompt=np.append(trunk[:length], tail)))
    requests = list(coming)
    while coming or scheduler.has_work:
        if coming and data.draw(st.booleans(), label="arrives"):
            scheduler.add(coming.pop(0))
        if scheduler.running and data.draw(st.integers(0, 14), label="aborts") == 0:
            scheduler.end(data.draw(st.sampled_from(scheduler.running)), FinishReason.ABORT)
        step = scheduler.next_step(settled=not flights) if scheduler.has_work else None
        if step is not None and step.requests:
            check_step(step, device, device.receive(step), slots, written)
            flights.append(step)
        if flights and (len(flights) > 1 or step is None or not step.requests or data.draw(st.booleans())):
            commit(scheduler, flights.pop(0), np.full(slots, 7, np.int32))
        elif not scheduler.has_work:
            flights.clear()
        cache.check_integrity()
    assert {each.finish_reason for each in requests} <= {FinishReason.LENGTH, FinishReason.ABORT}
    assert cache.held_tokens == 0
