"""Several replicas under one scheduler, on the host alone: where requests go, one queue, and one parcel."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_support import CONTEXT, PAGE, Clock, PretendDevice, check_step, commit, request

from engine.errors import RequestTooLarge
from engine.memory.manager import CacheManager
from engine.serving.device.batcher import Batcher, parcel_shapes
from engine.serving.device.parcel import FIELDS, FLOAT_FIELDS, StepParcel
from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.replica import Replica
from engine.serving.plan.scheduler import Scheduler
from engine.serving.request import FinishReason, RequestState
from engine.serving.watch.exporter import EngineCollector
from engine.serving.watch.metrics import collect_metrics
from engine.serving.watch.stats import EngineStats


def make(replicas=2, size=64, slots=3, budget=16, policy="lru"):
    queue = RequestQueue()
    caches = [CacheManager(size, PAGE, slots, CONTEXT, policy=policy) for _ in range(replicas)]
    options = {"max_running_requests": slots, "max_step_tokens": budget, "pool_name": "the pool of a replica"}
    members = [Replica(cache, queue, index=index, **options) for index, cache in enumerate(caches)]
    return Scheduler(members, queue, Clock())


def run_step(balancer, token=7):
    step = balancer.next_step()
    slots = balancer.replicas[0].max_running_requests
    return step, commit(balancer, step, np.full(len(balancer.replicas) * slots, token, np.int32))


def finish(balancer):
    finished = []
    while balancer.has_work:
        step, done = run_step(balancer)
        assert step.requests
        finished += [r.request_id for r in done]
    for replica in balancer.replicas:
        replica.cache.check_integrity()
    assert balancer.held_tokens == 0
    return finished


def places(balancer):
    return {r.request_id: index for index, replica in enumerate(balancer.replicas) for r in replica.running}


def test_requests_go_to_the_emptiest_replica():
    balancer = make()
    for number, length in enumerate([20, 4, 6, 5], start=1):
        balancer.add(request(number, length, new=1))
    balancer.next_step()
    assert places(balancer) == {1: 0, 2: 1, 3: 1, 4: 1}  # 20 tokens against 15


def test_a_request_that_waits_for_another_is_in_no_step_wherever_the_next_one_goes():
    balancer = make(size=128)
    prompt = np.arange(13, dtype=np.int32)
    leader, follower = request(1, 0, new=4, prompt=prompt), request(2, 0, new=4, prompt=np.arange(15, dtype=np.int32))
    balancer.add(leader)
    under_way = balancer.next_step()
    balancer.add(follower)
    balancer.add(request(3, 6))  # for which the replicas are compared once the follower has its row
    step = balancer.next_step(settled=False)
    assert places(balancer) == {1: 0, 2: 0, 3: 1}
    assert list(step.parts[0].requests) == [leader]
    assert step.parts[0].membership is None
    for each in (under_way, step):
        commit(balancer, each, np.full(6, 7, np.int32))
    assert sorted(finish(balancer)) == [1, 2, 3]


def test_a_prompt_goes_where_it_is_cached_unless_that_replica_is_much_fuller():
    balancer = make(size=128, slots=4, budget=64)
    shared = np.arange(20, dtype=np.int32)
    balancer.add(request(1, 2, new=30))  # keeps the first replica the fuller one
    balancer.add(request(2, 0, new=1, prompt=shared))
    run_step(balancer)
    balancer.add(request(3, 4, new=30))
    balancer.add(request(4, 4, new=30))
    run_step(balancer)
    assert places(balancer) == {1: 0, 3: 1, 4: 0}
    balancer.add(again := request(5, 0, new=30, prompt=shared))
    run_step(balancer)
    assert (again.replica, again.cached_tokens) == (1, 16)
    balancer.add(twice := request(6, 0, new=30, prompt=shared))
    run_step(balancer)
    assert (twice.replica, twice.cached_tokens) == (1, 16)  # some 20 tokens more, of a pool of 128: not yet much fuller
    balancer.add(third := request(7, 0, new=30, prompt=shared))
    run_step(balancer)
    assert (third.replica, third.cached_tokens) == (0, 0)  # some 40 tokens more
    finish(balancer)


def test_a_replica_without_a_slot_does_not_keep_requests_from_the_others():
    balancer = make(slots=1)
    shared = np.arange(12, dtype=np.int32)
    balancer.add(request(1, 0, new=20, prompt=shared))
    run_step(balancer)
    balancer.add(cached_elsewhere := request(2, 0, new=20, prompt=shared))
    run_step(balancer)
    assert (cached_elsewhere.replica, cached_elsewhere.cached_tokens) == (1, 0)


def test_one_queue_in_order_of_rank_and_no_request_overtakes():
    balancer = make(size=32, slots=2)
    for number, length in enumerate([20, 20, 20, 2], start=1):
        balancer.add(request(number, length))
    run_step(balancer)
    assert places(balancer) == {1: 0, 2: 1}  # 4 would fit, but 3 waits before it
    assert [r.request_id for r in balancer.waiting] == [3, 4]
    assert finish(balancer) == [1, 2, 4, 3]  # the fourth came with the third and has less to compute


def test_a_request_retracted_on_one_replica_may_continue_on_another():
    balancer = make(size=48, policy=None)
    # The first two share a replica until its pool is full; the other one is free by then.
    for number, length, new in ((1, 8, 36), (2, 20, 1), (3, 8, 30)):
        balancer.add(request(number, length, new=new))
    while not balancer.retractions:
        run_step(balancer)
    moved = next(r for r in [*balancer.running, *balancer.waiting] if r.retractions)
    assert (moved.request_id, moved.replica) == (3, 1)
    assert moved.req_pool_idx is not None
    assert sorted(finish(balancer)) == [1, 3]
    assert len(moved.output) == 30


def test_a_fork_stays_with_its_parent():
    balancer = make(size=128)
    balancer.add(request(1, 4, new=20))
    balancer.add(parent := request(2, 11))
    run_step(balancer)
    child = request(3, 0, prompt=np.arange(11, dtype=np.int32) + 200)
    balancer.fork(parent, child)
    (copy,) = balancer.replicas[1].cache.take_moves()
    assert (parent.replica, child.replica) == (1, 1)
    table = balancer.replicas[1].cache.page_table
    assert table.row_pages(child.req_pool_idx)[2] == copy.targets[0]
    finish(balancer)
    assert len(child.output) == 4


def test_a_request_must_fit_into_the_pool_of_one_replica():
    balancer = make(size=32)
    with pytest.raises(RequestTooLarge, match="needs 36 tokens of KV in whole pages, the pool of a replica has 32"):
        balancer.add(request(1, 33, new=1))
    assert not balancer.has_work


def test_time_that_is_up_ends_requests_wherever_they_are():
    balancer = make(slots=1)
    requests = [request(n, 4, new=20, timeout=5.0) for n in (1, 2, 3)]
    for each in requests:
        balancer.add(each)
    run_step(balancer)
    balancer.clock.now += 5
    assert balancer.expire() == requests
    assert {r.finish_reason for r in requests} == {FinishReason.TIMEOUT}
    assert not balancer.has_work
    assert balancer.held_tokens == 0


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("where", ["take", "evict"])
def test_a_step_that_one_replica_cannot_take_is_taken_by_none(monkeypatch, which, where):
    balancer = make(size=32)
    for number in (1, 2):
        balancer.add(request(number, 20, new=1))  # leaves a full cache behind
    finish(balancer)
    for number in (3, 4):
        balancer.add(request(number, 20, new=4))
    cache = balancer.replicas[which].cache

    def boom(*_):
        raise OSError("the host tier is gone")

    with monkeypatch.context() as patched:
        patched.setattr(cache.allocator.pages if where == "take" else cache.prefix, where, boom)
        with pytest.raises(OSError, match="gone"):
            balancer.next_step()
    balancer.restart([*balancer.running, *balancer.waiting])
    for replica in balancer.replicas:
        replica.cache.check_integrity()
    assert not balancer.running
    assert {r.state for r in balancer.waiting} == {RequestState.WAITING}
    assert sorted(finish(balancer)) == [3, 4]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("where", ["advance", "finish"])
def test_a_step_that_cannot_be_cached_on_one_replica_is_booked_on_all(monkeypatch, which, where):
    """``advance`` is called for prompts that were computed, ``finish`` for answers that end."""
    balancer = make(slots=2)
    requests = [request(number, 6, new=1 + 2 * (number > 2)) for number in (1, 2, 3, 4)]
    for each in requests:
        balancer.add(each)
    ended, faults = [], balancer.queue.faults

    def boom(*_, **__):
        raise OSError("no memory for a node")

    monkeypatch.setattr(balancer.replicas[which].cache.prefix, where, boom)
    while balancer.has_work:
        step, lengths = balancer.next_step(), [len(each.output) for each in requests]
        ran = {r.request_id for r, _ in balancer.sampled_rows(step)}
        balancer.commit(step, np.full(4, 7, np.int32), ended)
        for each, length in zip(requests, lengths, strict=True):
            assert len(each.output) == length + (each.request_id in ran)
        for replica in balancer.replicas:
            replica.cache.check_integrity()
    assert [str(fault) for fault in faults] == ["no memory for a node"] * 2  # of both of that replica's requests
    assert sorted(r.request_id for r in ended) == [1, 2, 3, 4]
    assert balancer.held_tokens == 0


def test_a_step_that_cannot_be_cached_on_one_replica_is_taken_back_on_all(monkeypatch):
    balancer = make(slots=2)
    for number in (1, 2, 3, 4):
        balancer.add(request(number, 6))
    run_step(balancer)
    balancer.next_step()

    def boom(*_, **__):
        raise OSError("no memory for a node")

    with monkeypatch.context() as patched:
        patched.setattr(balancer.replicas[0].cache.prefix, "finish", boom)
        balancer.restart(balancer.running)
    assert not balancer.running
    assert [r.state for r in balancer.waiting] == [RequestState.WAITING] * 4
    assert balancer.held_tokens == 0
    assert sorted(finish(balancer)) == [1, 2, 3, 4]


def test_metrics_are_sums_and_say_what_each_replica_has():
    balancer = make()
    for number, length in ((1, 20), (2, 4), (3, 6)):
        balancer.add(request(number, length, new=8))
    run_step(balancer)
    metrics = collect_metrics(balancer, EngineStats())
    assert (metrics.running, metrics.pool.total_pages) == (3, 2 * 64 // PAGE)
    assert [(r.request_id, r.replica) for r in metrics.requests] == [(1, 0), (2, 1), (3, 1)]
    for name in ("free_pages", "private_pages", "locked_pages", "evictable_pages"):
        assert getattr(metrics.pool, name) == sum(getattr(pool, name) for pool in metrics.pool.replicas)
    assert metrics.prefix_cache.queried_tokens == 30
    families = {family.name: family for family in EngineCollector(lambda: metrics).collect()}
    running = families["engine_num_requests_replica_running"].samples
    assert [(sample.labels["replica"], sample.value) for sample in running] == [("0", 1), ("1", 2)]
    usage = families["engine_kv_cache_replica_usage_perc"].samples
    assert [sample.value for sample in usage] == [pool.usage for pool in metrics.pool.replicas]
    finish(balancer)


def parcels_of(joined, shape, replicas):
    """Each replica's parcel out of the packed one, as its devices see it."""
    for packed in joined.packed.reshape(replicas, -1):
        views = {name: packed[start:stop] for name, (start, stop) in zip(FIELDS, shape.bounds, strict=True)}
        views |= {name: views[name].view(np.float32) for name in FLOAT_FIELDS}
        yield StepParcel(**views, packed=packed)


def check_parcels(balancer, batcher, devices, step, written, smallest):
    """Every replica's part of the joined parcel, whether it has work or not."""
    slots, replicas = balancer.replicas[0].max_running_requests, len(balancer.replicas)
    parcel, shape, earlier = batcher.fill(step)
    parcels = list(parcels_of(parcel, shape, replicas))
    for index, (device, part) in enumerate(zip(devices, step.parts, strict=True)):
        updates = [tables.reshape(replicas, 2, -1)[index] for tables in earlier]
        received = device.take(part, parcels[index], shape, updates)
        check_step(part, device, received, slots, written[index])
    assert shape.tokens < 2 * max(part.num_tokens for part in step.parts) or shape == smallest
    assert (parcel.top_k == [each.top_k for each in parcels]).all()


@settings(max_examples=8, suppress_health_check=[HealthCheck.large_base_example, HealthCheck.too_slow])
@given(st.data())
def test_every_request_finishes_and_no_replica_idles_while_others_queue(data):
    replicas, size = data.draw(st.integers(2, 3), label="replicas"), data.draw(st.sampled_from([16, 32, 64]))
    slots, budget = data.draw(st.integers(1, 3), label="slots"), data.draw(st.integers(1, 12), label="budget")
    balancer = make(replicas, size, slots, budget)
    shapes = parcel_shapes(slots, balancer.replicas[0].max_step_tokens, PAGE)
    tables = [replica.cache.page_table for replica in balancer.replicas]
    batcher = Batcher(shapes, replicas)
    devices = [PretendDevice(table, shapes) for table in tables]
    shared = np.arange(size - 8, dtype=np.int32)
    coming = []
    for number in range(1, 9):
        length, new = data.draw(st.integers(1, size - 8)), data.draw(st.integers(1, 8))
        prompt = shared[:length] if data.draw(st.booleans()) else None
        coming.append(request(number, length, new, prompt=prompt, priority=data.draw(st.integers(0, 2))))
    requests, written, flights = list(coming), [{} for _ in range(replicas)], []
    while coming or balancer.has_work:
        if coming and data.draw(st.booleans(), label="arrives"):
            balancer.add(coming.pop(0))
        if balancer.running and data.draw(st.integers(0, 9), label="aborts") == 0:
            balancer.end(data.draw(st.sampled_from(balancer.running)), FinishReason.ABORT)
        if balancer.has_work and (step := balancer.next_step(settled=not flights)) is not None and step.requests:
            assert not (balancer.waiting and any(not replica.running for replica in balancer.replicas))
            check_parcels(balancer, batcher, devices, step, written, shapes[0])
            if data.draw(st.integers(0, 9), label="fails") == 0:
                balancer.restart([*balancer.running, *balancer.waiting])
                flights.clear()
            else:
                flights.append(step)
        if flights and (len(flights) > 1 or data.draw(st.booleans(), label="in turn") or step is None):
            landed = flights.pop(0)
            rows = balancer.sampled_rows(landed)
            live = [replica._still_run(part) for replica, part in zip(balancer.replicas, landed.parts, strict=True)]
            assert {r.request_id for r, _ in rows} == {
                r.request_id
                for r, on, out in zip(
                    landed.requests,
                    np.concatenate(live),
                    np.concatenate([part.samples for part in landed.parts]),
                    strict=True,
                )
                if on and out
            }
            tokens = np.arange(replicas * slots, dtype=np.int32)
            before = {r.request_id: len(r.output) for r, _ in rows}
            commit(balancer, landed, tokens)
            for r, row in rows:
                assert row // slots == r.replica
                assert r.output[before[r.request_id] :] == [row]
        elif not balancer.has_work:
            flights.clear()
        for replica in balancer.replicas:
            replica.cache.check_integrity()
    assert {r.finish_reason for r in requests} <= {FinishReason.LENGTH, FinishReason.ABORT}
    assert balancer.held_tokens == 0


def test_siblings_of_a_leader_that_moved_to_another_replica_in_mid_prompt_wait_their_turn():
    """The leader is retracted from a full replica in the plan that books its first token, and admitted by the other."""
    balancer = make(replicas=2, size=96, slots=2, budget=16)
    leader, sibling = request(1, 48, new=12, n=2), request(2, 48, new=12)
    balancer.add(leader)
    while not leader.output:
        run_step(balancer)
    home = leader.replica
    balancer.replicas[home]._retract(leader)
    for replica in balancer.replicas:
        replica.cache.reset_prefix_cache()
    run_step(balancer)
    assert leader.req_pool_idx is not None
    balancer.fork(leader, sibling)
    assert sibling in balancer.waiting
    finish(balancer)
    assert [len(r.output) for r in (leader, sibling)] == [12, 12]
