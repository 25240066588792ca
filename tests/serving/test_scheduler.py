"""The scheduler on the host alone: a pretend model, real pages."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import event as hypothesis_event
from hypothesis import strategies as st
from scheduler_support import (
    CONTEXT,
    PAGE,
    SCOPE,
    PretendDevice,
    check_step,
    commit,
    make,
    plan_every_step_anew,
    request,
    run_step,
)

from engine.errors import RequestTooLarge, ShapeError
from engine.serving.device.batcher import parcel_shapes, token_buckets
from engine.serving.device.parcel import FIELDS
from engine.serving.request import AGING_SECONDS, FinishReason, Request, RequestState
from engine.serving.sampling_params import SamplingParams


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


def test_admission_leaves_running_requests_the_pages_that_they_soon_need():
    cache, scheduler = make(size=32)
    scheduler.add(request(1, 12, new=8))  # 3 pages of 8
    run_step(scheduler)
    scheduler.add(request(2, 17, new=2))  # 5 pages: they are there, but then 1 could not grow
    step, _ = run_step(scheduler)
    assert [row.request.request_id for row in step.rows] == [1]
    while scheduler.has_work:
        run_step(scheduler)
    assert scheduler.retractions == 0
    assert cache.held_tokens == 0


def test_a_chunked_prompt_keeps_what_it_was_promised():
    _, scheduler = make(size=64, budget=8)
    scheduler.add(request(1, 40))  # 10 of 16 pages, taken 2 a step
    run_step(scheduler)
    scheduler.add(request(2, 24))  # 6 pages are free of promises, but not one more for 1 to grow into
    for _ in range(3):
        step, _ = run_step(scheduler)
        assert [row.request.request_id for row in step.rows] == [1]


def test_a_request_larger_than_the_pool_is_refused_at_the_door():
    _, scheduler = make(size=32)
    with pytest.raises(
        RequestTooLarge, match="needs 36 tokens of KV in whole pages, the pool has 32; shorten the prompt"
    ):
        scheduler.add(request(1, 33, new=1))
    scheduler.add(request(1, 32, new=1))
    assert not run_step(scheduler)[1] or scheduler.has_work


def test_a_full_pool_retracts_the_youngest_request_and_all_requests_finish():
    cache, scheduler = make(size=48)
    requests = [request(n, 8, new=30) for n in (1, 2, 3)]  # each needs 10 of 12 pages in the end
    for each in requests:
        scheduler.add(each)
    order = []
    while scheduler.has_work:
        _, finished = run_step(scheduler)
        order += [r.request_id for r in finished]
        cache.check_integrity()
    assert order == [1, 2, 3]
    assert requests[0].retractions == 0
    assert requests[2].retractions > 0
    assert scheduler.retractions == sum(r.retractions for r in requests)
    assert all(len(r.output) == 30 for r in requests)


def test_a_retracted_request_is_not_admitted_at_once():
    _, scheduler = make(size=48)
    for n in (1, 2, 3):
        scheduler.add(request(n, 8, new=30))
    while not scheduler.retractions:
        step, _ = run_step(scheduler)
    assert scheduler.waiting[0].request_id not in [row.request.request_id for row in step.rows]


def test_a_prompt_that_begins_alike_computes_only_the_rest():
    cache, scheduler = make()
    shared = np.arange(22, dtype=np.int32)
    scheduler.add(request(1, 0, prompt=shared))
    while scheduler.has_work:
        run_step(scheduler)
    second = request(2, 0, prompt=np.append(shared[:18], np.int32(99)))
    scheduler.add(second)
    step, _ = run_step(scheduler)
    assert (step.rows[0].start, step.rows[0].count) == (16, 3)
    assert second.cached_tokens == 16
    assert (cache.prefix.query_tokens, cache.prefix.hit_tokens) == (22 + 19, 16)
    cache.check_integrity()


def test_a_prompt_cached_whole_still_computes_its_last_page():
    _, scheduler = make()
    for n in (1, 2):
        scheduler.add(request(n, 0, prompt=np.arange(16, dtype=np.int32)))
        while scheduler.has_work:
            step, _ = run_step(scheduler)
            if n == 2 and step.rows[0].samples and not step.rows[0].is_decode:
                assert (step.rows[0].start, step.rows[0].count) == (12, 4)


def test_a_prompt_under_way_is_shared_with_the_next_request():
    _, scheduler = make(size=128, budget=8)
    shared = np.arange(40, dtype=np.int32)
    scheduler.add(request(1, 0, prompt=shared))
    for _ in range(4):
        run_step(scheduler)
    scheduler.add(request(2, 0, prompt=shared))
    run_step(scheduler)
    step, _ = run_step(scheduler)
    assert [(row.request.request_id, row.start) for row in step.rows if row.request.request_id == 2] == [(2, 36)]


def test_without_the_prefix_cache_nothing_is_kept():
    cache, scheduler = make(policy=None)
    for n in (1, 2):
        same = request(n, 0, prompt=np.arange(20, dtype=np.int32))
        scheduler.add(same)
        while scheduler.has_work:
            run_step(scheduler)
        assert same.cached_tokens == 0
        assert cache.allocator.available_size() == cache.size


def test_a_higher_priority_goes_first_and_a_long_wait_outranks_it():
    _, scheduler = make(slots=1)
    for n, priority in ((1, 0), (2, 0), (3, 1)):
        scheduler.add(request(n, 4, priority=priority))
    assert [r.request_id for r in scheduler.waiting] == [3, 1, 2]
    scheduler.clock.now += AGING_SECONDS + 1
    scheduler.add(request(4, 4, priority=1))
    assert [r.request_id for r in scheduler.waiting] == [3, 1, 2, 4]


def test_a_request_whose_time_is_up_ends_with_what_it_has():
    cache, scheduler = make(slots=1)
    running, waiting = request(1, 4, new=20, timeout=5.0), request(2, 4, timeout=5.0)
    scheduler.add(running)
    scheduler.add(waiting)
    run_step(scheduler)
    assert scheduler.expire() == []
    scheduler.clock.now += 5
    assert {r.request_id for r in scheduler.expire()} == {1, 2}
    assert {running.finish_reason, waiting.finish_reason} == {FinishReason.TIMEOUT}
    assert running.output == [7]
    assert cache.held_tokens == 0
    assert not scheduler.has_work


def test_a_fork_shares_full_pages_and_copies_the_partial_one():
    cache, scheduler = make(size=128, slots=3)
    parent, child = request(1, 11), request(2, 0, prompt=np.arange(11, dtype=np.int32) + 100)
    scheduler.add(parent)
    run_step(scheduler)
    scheduler.fork(parent, child)
    (copy,) = cache.take_moves()
    mine, theirs = cache.page_table.row_pages(parent.req_pool_idx), cache.page_table.row_pages(child.req_pool_idx)
    assert mine[:2].tolist() == theirs[:2].tolist()
    assert (copy.sources.tolist(), copy.targets.tolist()) == ([mine[2]], [theirs[2]])
    assert mine[2] != theirs[2]
    step, _ = run_step(scheduler)
    assert {(row.request.request_id, row.start, row.count) for row in step.rows} == {(1, 11, 1), (2, 10, 1)}
    cache.check_integrity()
    while scheduler.has_work:
        run_step(scheduler)
    assert cache.held_tokens == 0


def test_a_fork_at_a_page_boundary_copies_nothing():
    cache, scheduler = make(size=128)
    parent, child = request(1, 9), request(2, 0, prompt=np.arange(9, dtype=np.int32) + 100)
    scheduler.add(parent)
    run_step(scheduler)
    scheduler.fork(parent, child)
    assert cache.take_moves() == []
    assert child.state is RequestState.RUNNING
    assert cache.page_table.computed_len(child.req_pool_idx) == 8


def test_a_fork_without_room_waits_its_turn():
    _, scheduler = make(slots=1)
    parent, child = request(1, 9), request(2, 0, prompt=np.arange(9, dtype=np.int32) + 100)
    scheduler.add(parent)
    run_step(scheduler)
    scheduler.fork(parent, child)
    assert scheduler.waiting == [child]
    while scheduler.has_work:
        run_step(scheduler)
    assert child.cached_tokens == 8


@pytest.mark.parametrize("stage", ["waiting", "prefilling", "decoding", "finished"])
def test_an_abort_at_any_moment_gives_back_every_page(stage):
    cache, scheduler = make(slots=1)
    target = request(1, 30, new=2)
    if stage == "waiting":
        scheduler.add(request(2, 4))
    scheduler.add(target)
    for _ in range({"waiting": 1, "prefilling": 1, "decoding": 2, "finished": 3}[stage]):
        run_step(scheduler)
    scheduler.end(target, FinishReason.ABORT)
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
    device = PretendDevice(cache.page_table, parcel_shapes(slots, scheduler.max_step_tokens, PAGE))
    waiting = [
        request(n, data.draw(st.integers(1, min(size, CONTEXT) - 8)), data.draw(st.integers(1, 8))) for n in range(1, 7)
    ]
    requests = list(waiting)
    written = {}
    while waiting or scheduler.has_work:
        if waiting and data.draw(st.booleans(), label="arrives"):
            scheduler.add(waiting.pop(0))
        if scheduler.has_work:
            step = scheduler.next_step()
            assert step.requests
            check_step(step, device, device.receive(step), slots, written)
            commit(scheduler, step, np.zeros(slots, np.int32))
            cache.check_integrity()
    assert all(r.finish_reason is FinishReason.LENGTH for r in requests)
    assert cache.held_tokens == 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.large_base_example, HealthCheck.too_slow])
@given(st.data())
def test_a_repeated_step_is_the_one_that_planning_anew_would_make(data):
    """Two schedulers under the same traffic, overlapped; one of them plans every step from the beginning."""
    size = data.draw(st.sampled_from([32, 64, 256]), label="size")
    slots, overlap = data.draw(st.integers(1, 5), label="slots"), data.draw(st.booleans(), label="overlap")
    sides = [make(size, slots, 16) for _ in range(2)]
    planner = sides[1][1]
    plan_every_step_anew(planner)
    devices = [PretendDevice(cache.page_table, parcel_shapes(slots, 16, PAGE)) for cache, _ in sides]
    stop_at = data.draw(st.integers(2, 60), label="stop at")
    shapes = [(data.draw(st.integers(1, 8)), data.draw(st.integers(1, 24))) for _ in range(5)]
    flights, number, repeats = [], 0, 0
    while number < len(shapes) or sides[0][1].has_work:
        event = data.draw(st.sampled_from(["step"] * 12 + ["add", "end"]), label="event")
        if event == "add" or not sides[0][1].has_work:
            if number < len(shapes):
                for _, scheduler in sides:
                    scheduler.add(stoppable(number, *shapes[number]))
                number += 1
        elif event == "end" and sides[0][1].running:
            at = data.draw(st.integers(0, len(sides[0][1].running) - 1))
            for _, scheduler in sides:
                scheduler.end(scheduler.running[at], FinishReason.ABORT)
        steps = [scheduler.next_step(settled=not flights) for _, scheduler in sides]
        if steps[0] is not None and steps[0].requests:
            assert_same(*steps)
            repeats += steps[0].parts[0].repeats
            parcels = [device.receive(step) for device, step in zip(devices, steps, strict=True)]
            for name in FIELDS:
                if not name.startswith("update"):  # pages may be others, but lead to the same tokens
                    np.testing.assert_array_equal(*(getattr(parcel[0], name) for parcel in parcels))
            flights.append((steps, STOP if len(flights) + sum(r.num_tokens for r in planner.running) > stop_at else 7))
        else:
            assert (steps[1] is None) == (steps[0] is None)
        while flights and (len(flights) > overlap or steps[0] is None or not steps[0].requests):
            both, token = flights.pop(0)
            ended = [
                commit(scheduler, step, np.full(slots, token, np.int32))
                for (_, scheduler), step in zip(sides, both, strict=True)
            ]
            assert len({tuple((r.request_id, r.finish_reason) for r in each) for each in ended}) == 1
        for cache, _ in sides:
            cache.check_integrity()
    assert [cache.held_tokens for cache, _ in sides] == [0, 0]
    hypothesis_event("repeated" if repeats else "never repeated")


STOP = 99


def stoppable(number, prompt_len, new):
    prompt = np.arange(prompt_len, dtype=np.int32) + 100 * number
    return Request(number, prompt, SamplingParams(max_new_tokens=new), frozenset({STOP}), SCOPE)


def assert_same(step, other):
    assert [r.request_id for r in step.requests] == [r.request_id for r in other.requests]
    assert [r.output for r in step.requests] == [r.output for r in other.requests]
    assert (step.num_tokens, step.num_decode_tokens) == (other.num_tokens, other.num_decode_tokens)
    (part,), (other_part,) = step.parts, other.parts
    for name in ("req_pool_idx", "starts", "counts", "on_device", "samples", "ends", "generations"):
        np.testing.assert_array_equal(getattr(part, name), getattr(other_part, name), name)
    assert step.num_tokens == part.counts.sum()
    assert step.num_decode_tokens == part.counts[part.on_device].sum()
    assert not other_part.repeats


def test_while_no_request_begins_or_ends_a_step_is_not_planned_anew(monkeypatch):
    cache, scheduler = make(size=128)
    for number in (1, 2, 3):
        scheduler.add(request(number, 5 + number, new=20))
    for _ in range(5):
        run_step(scheduler)
    monkeypatch.setattr(scheduler.replicas[0], "_next_rows", None)
    for _ in range(10):
        step, _ = run_step(scheduler)
        assert step.parts[0].repeats
    monkeypatch.undo()
    scheduler.end(scheduler.running[1], FinishReason.ABORT)
    assert not run_step(scheduler)[0].parts[0].repeats
    while scheduler.has_work:
        run_step(scheduler)
    assert cache.held_tokens == 0


def test_a_repeated_step_waits_for_no_room_and_retracts():
    cache, scheduler = make(size=32, slots=2)
    requests = [request(number, 4, new=20) for number in (1, 2)]
    for each in requests:
        scheduler.add(each)
    kinds = []
    while scheduler.has_work:
        kinds.append(run_step(scheduler)[0].parts[0].repeats)
        cache.check_integrity()
    assert scheduler.retractions
    assert True in kinds
    assert [len(each.output) for each in requests] == [20, 20]


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
    row = np.array([cache.admit(SCOPE, np.arange(8, dtype=np.int32)).row], np.int32)
    cache.grow(row, np.array([7], np.int32))
    before = cache.held_tokens, cache.page_table.kv_lens(row).tolist()
    with pytest.raises(ShapeError, match=f"cannot grow to {CONTEXT + 1} tokens: max_context_tokens is {CONTEXT}"):
        cache.grow(row, np.array([CONTEXT - 6], np.int32))
    assert (cache.held_tokens, cache.page_table.kv_lens(row).tolist()) == before
    cache.check_integrity()


@pytest.mark.parametrize(
    ("twice", "counts", "message"),
    [(True, [4, 4], "more than once"), (False, [4], "different lengths"), (False, [4, -1], "cannot grow by -1 tokens")],
)
def test_a_refused_growth_takes_no_page(twice, counts, message):
    cache, _ = make()
    first, second = (cache.admit(SCOPE, np.arange(16, dtype=np.int32) + start).row for start in (0, 100))
    rows = np.array([first, first if twice else second], np.int32)
    with pytest.raises(ShapeError, match=message):
        cache.grow(rows, np.array(counts, np.int32))
    assert cache.held_tokens == 0
    cache.check_integrity()


@pytest.mark.parametrize("tokens", [0, CONTEXT + 1])
def test_only_what_a_row_can_hold_is_admitted(tokens):
    cache, _ = make(size=128)
    with pytest.raises(ShapeError, match=f"cannot admit {tokens} tokens"):
        cache.admit(SCOPE, np.zeros(tokens, np.int32))


def test_a_step_that_did_not_run_is_taken_back():
    cache, scheduler = make()
    for number in (1, 2):
        scheduler.add(request(number, 10))
    run_step(scheduler)
    scheduler.next_step()
    scheduler.restart(scheduler.running)
    assert [r.request_id for r in scheduler.waiting] == [1, 2]
    assert [r.state for r in scheduler.waiting] == [RequestState.WAITING] * 2
    assert cache.held_tokens == 0
    cache.check_integrity()
    while scheduler.has_work:
        run_step(scheduler)
    cache.check_integrity()


def test_twins_in_a_tight_pool_share_the_prompt_that_one_of_them_computes():
    cache, scheduler = make(size=64, budget=64)
    prompt = np.arange(20, dtype=np.int32)
    for number, new in ((1, 2), (2, 40)):
        scheduler.add(request(number, 0, new=new, prompt=prompt))
    finished = []
    while scheduler.has_work:
        step, done = run_step(scheduler)
        assert step.rows
        finished += [r.request_id for r in done]
        cache.check_integrity()
    assert finished == [1, 2]
    assert scheduler.retractions == 0


@pytest.mark.parametrize("decoding", [False, True])
def test_a_request_for_which_no_token_can_be_chosen_ends_and_its_pages_are_free(decoding):
    cache, scheduler = make(size=128)
    requests = [request(number, 9, new=12) for number in (1, 2, 3)]
    for each in requests:
        scheduler.add(each)
    for _ in range(4 if decoding else 1):
        run_step(scheduler)
    while scheduler.waiting or not all(r.output for r in requests[:2]):
        run_step(scheduler)
    step, lengths = scheduler.next_step(), [len(r.output) for r in requests]
    tokens = np.full(5, 7, np.int32)
    tokens[[r.request_id for r in step.requests].index(2)] = -2
    finished = commit(scheduler, step, tokens)
    assert [(r.request_id, r.finish_reason) for r in finished] == [(2, FinishReason.NON_FINITE)]
    assert "NaN or infinite" in requests[1].error
    assert [len(r.output) - n for r, n in zip(requests, lengths, strict=True)] == [1, 0, 1]
    assert requests[1].req_pool_idx is None
    cache.check_integrity()
    while scheduler.has_work:
        run_step(scheduler)
    assert [len(r.output) for r in requests] == [12, lengths[1], 12]
    assert cache.held_tokens == 0


def test_a_parent_that_was_retracted_after_its_first_token_is_not_forked_half_computed():
    cache, scheduler = make(size=128, budget=8)
    parent, child = request(1, 20, new=8, n=2), request(2, 20, new=8)
    scheduler.add(parent)
    while not parent.output:
        run_step(scheduler)
    scheduler.replicas[0]._retract(parent)
    cache.reset_prefix_cache()
    run_step(scheduler)  # it runs again, and has computed 8 of its 20 tokens
    assert parent.req_pool_idx is not None
    scheduler.fork(parent, child)
    assert child in scheduler.waiting
    while scheduler.has_work:
        run_step(scheduler)
        cache.check_integrity()
    assert [len(r.output) for r in (parent, child)] == [8, 8]
