"""Steps of replicas that repeat the one before, a token further: when, all or none, and that they are the same."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_support import PAGE, PretendDevice, commit, plan_every_step_anew, request
from test_balancer import finish, make, parcels_of, run_step

from engine.serving.device.batcher import Batcher, parcel_shapes
from engine.serving.device.parcel import FIELDS
from engine.serving.request import FinishReason


@pytest.mark.parametrize("requests", [1, 2, 3, 5])
def test_while_no_request_begins_or_ends_no_replica_plans_anew(monkeypatch, requests):
    """Also where one of them has no request, or a request waits that no replica has a slot for."""
    balancer = make(slots=2, size=128)
    for number in range(1, requests + 1):
        balancer.add(request(number, 5 + number, new=20))
    for _ in range(5):
        run_step(balancer)
    with monkeypatch.context() as patched:
        for replica in balancer.replicas:
            if replica.running:
                patched.setattr(replica, "_next_rows", None)
        for _ in range(10):
            step, _ = run_step(balancer)
            assert all(part.repeats for part in step.parts if part.requests)
            assert len(step.requests) == min(requests, 4)
    balancer.end(balancer.running[0], FinishReason.ABORT)
    step, _ = run_step(balancer)
    assert not step.parts[0].repeats
    finish(balancer)


@pytest.mark.parametrize("which", [0, 1])
def test_a_repeated_step_that_one_replica_cannot_take_is_taken_by_none(monkeypatch, which):
    balancer = make(slots=2)
    requests = [request(number, 6, new=12) for number in (1, 2, 3)]
    for each in requests:
        balancer.add(each)
    while not run_step(balancer)[0].parts[0].repeats:
        pass

    def boom(*_):
        raise OSError("the host tier is gone")

    with monkeypatch.context() as patched:
        patched.setattr(balancer.replicas[which].cache, "grow", boom)
        with pytest.raises(OSError, match="gone"):
            balancer.next_step()
    balancer.restart(balancer.running)
    for replica in balancer.replicas:
        replica.cache.check_integrity()
    assert [r.request_id for r in balancer.waiting] == [1, 2, 3]
    assert sorted(finish(balancer)) == [1, 2, 3]
    assert [len(each.output) for each in requests] == [12, 12, 12]


@settings(max_examples=40, suppress_health_check=[HealthCheck.large_base_example, HealthCheck.too_slow])
@given(st.data())
def test_a_repeated_step_of_replicas_is_the_one_that_planning_anew_would_make(data):
    """Two balancers under the same traffic, overlapped; the replicas of one plan every step from the beginning."""
    replicas, size = data.draw(st.integers(1, 3), label="replicas"), data.draw(st.sampled_from([32, 64, 256]))
    slots, overlap = data.draw(st.integers(1, 3), label="slots"), data.draw(st.booleans(), label="overlap")
    sides = [make(replicas, size, slots) for _ in range(2)]
    plan_every_step_anew(sides[1])
    tables = [[replica.cache.page_table for replica in side.replicas] for side in sides]
    shapes = parcel_shapes(slots, 16, PAGE)
    batchers = [Batcher(shapes, replicas) for _ in sides]
    devices = [[PretendDevice(table, shapes) for table in each] for each in tables]
    coming, flights = [(data.draw(st.integers(1, 8)), data.draw(st.integers(1, 24))) for _ in range(6)], []
    while coming or sides[0].has_work:
        event = data.draw(st.sampled_from(["step"] * 12 + ["add", "end"]), label="event")
        if coming and (event == "add" or not sides[0].has_work):
            for side in sides:
                side.add(request(len(coming), *coming[-1]))
            coming.pop()
        elif event == "end" and sides[0].running:
            at = data.draw(st.integers(0, len(sides[0].running) - 1))
            for side in sides:
                side.end(side.running[at], FinishReason.ABORT)
        steps = [side.next_step(settled=not flights) for side in sides]
        assert (steps[0] is None) == (steps[1] is None)
        if steps[0] is not None and steps[0].requests:
            filled = [batcher.fill(step) for batcher, step in zip(batchers, steps, strict=True)]
            for name in FIELDS:
                if not name.startswith("update"):  # pages may be others, but lead to the same tokens
                    np.testing.assert_array_equal(*(getattr(parcel, name) for parcel, _, _ in filled), err_msg=name)
            for each, step, (parcel, shape, earlier) in zip(devices, steps, filled, strict=True):
                for index, part in enumerate(parcels_of(parcel, shape, replicas)):
                    updates = [table.reshape(replicas, 2, -1)[index] for table in earlier]
                    each[index].take(step.parts[index], part, shape, updates)
            flights.append(steps)
        while flights and (len(flights) > overlap or steps[0] is None or not steps[0].requests):
            for side, step in zip(sides, flights.pop(0), strict=True):
                commit(side, step, np.full(replicas * slots, 7, np.int32))
                for replica in side.replicas:
                    replica.cache.check_integrity()
