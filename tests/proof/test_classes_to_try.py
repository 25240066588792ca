"""Bugs that other engines had in their control plane, a test for each; docs/proof.md says where the others are."""

import numpy as np
import pytest
from manager_world import SCOPES, ManagerScope, ManagerWorld
from scheduler_world import STOP, SchedulerScope, SchedulerWorld

from engine.errors import DoubleFreeError, RequestTooLarge
from engine.serving.request import FinishReason, RequestState


def played(world, *moves):
    for move in moves:
        world.play(move)
        world.check()
    return world


def driven(world, *, overlaps=True):
    """An engine that is left alone until every request has ended."""
    for _ in range(2000):
        move = world.way_on(overlaps=overlaps)
        if move is None:
            return world
        played(world, move)
    raise AssertionError("requests do not end")


def arrived(world):
    return played(world, *(("arrive", number) for number in range(len(world.requests))))


def free_pages(world):
    return world.cache.allocator.pages.available


@pytest.mark.parametrize("stops_at", [0, 1, 2, None])
def test_the_last_decode_slot_is_freed_once_at_page_1_with_overlap(stops_at):
    world = arrived(SchedulerWorld(SchedulerScope(5, 1, 1, 2, (((0, 0), 3, 0),))))
    for at in range(3):
        if world.scheduler.has_work:
            played(world, ("step", STOP if at == stops_at else 0))
        if len(world.flights) == 2:
            played(world, ("commit",))
    driven(world)
    assert world.requests[0].finish_reason is (FinishReason.LENGTH if stops_at is None else FinishReason.STOP)
    assert free_pages(world) + world.cache.prefix.cached_pages == 5
    assert world.cache.allocator.pages.ref_count(np.arange(6)).max() <= 1


@pytest.mark.parametrize("pages", [1, 2])
def test_a_prompt_whose_length_less_one_is_a_multiple_of_the_page_comes_from_the_tier(pages):
    prompt = (0, 1, 1, 0, 0)[: 2 * pages + 1]
    world = ManagerWorld(ManagerScope(4, 2, 1, 6, (prompt,), host_pages=4, pending=9))
    played(world, ("admit", prompt), ("grow", 0, None), ("release", 0, True))
    assert world.cache.prefix.evict(9) == pages
    played(world, ("move",), ("land",), ("admit", prompt))
    row = world.sequences[0].row
    assert (world.cache.page_table.computed_len(row), world.cache.page_table.kv_len(row)) == (0, 2 * pages)
    played(world, ("grow", 0, None), ("publish", 0))
    assert world.cache.page_table.computed_len(row) == len(prompt)


def test_tokens_past_a_stop_are_in_no_key():
    world = arrived(SchedulerWorld(SchedulerScope(8, 1, 1, 2, (((0, 0), 5, 0),))))
    played(world, ("step", 0), ("step", STOP), ("commit",), ("step", 0), ("commit",))  # the last lies past the stop
    request = world.requests[0]
    assert request.finish_reason is FinishReason.STOP
    known = [*request.prompt.tolist(), *request.output]
    cached = [tokens.tolist() for _, tokens, _, _ in world.cache.prefix.runs()]
    assert cached == [known[: len(each)] for each in cached] != []
    assert max(map(len, cached)) < len(known)  # the stop itself was sampled and is never fed


def test_a_retracted_request_keeps_its_place():
    requests = (((0, 0, 0), 4, 0), ((0, 1, 0), 4, 0), ((1, 1, 0), 4, 0))
    world = arrived(SchedulerWorld(SchedulerScope(5, 2, 2, 4, requests)))
    ended: list[int] = []
    for _ in range(200):
        move = world.way_on(overlaps=True)
        if move is None:
            break
        waiting = [request.request_id for request in world.scheduler.waiting]
        assert waiting == sorted(waiting), "who was retracted has lost its place"
        played(world, move)
        over = [each.request_id for each in world.requests if each.state is RequestState.ENDED]
        ended += [each for each in over if each not in ended]
    assert world.scheduler.retractions
    assert ended == [0, 1, 2]


def test_a_giant_is_refused_or_takes_its_turn_and_small_ones_end():
    giant, small = ((0,) * 8, 5, 0), ((1, 0), 2, 0)
    world = SchedulerWorld(SchedulerScope(6, 2, 3, 4, (small, giant, small, small, ((0,) * 9, 5, 0))))
    played(world, *(("arrive", number) for number in range(4)))
    with pytest.raises(RequestTooLarge):
        world.play(("arrive", 4))
    driven(world)
    assert all(request.finish_reason is FinishReason.LENGTH for request in world.requests[:4])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_prefix_published_from_two_rows_is_evicted_once(order):
    prompt = (0, 1)
    world = ManagerWorld(ManagerScope(6, 1, 2, 3, (prompt,)))
    played(world, ("admit", prompt), ("admit", prompt), ("grow", 0, None), ("grow", 1, None))
    played(world, *(("publish", each) for each in order))
    assert free_pages(world) == 4  # the second row has taken the pages of the first and given its own back
    played(world, ("release", order[0], True))
    assert not world.cache.prefix.evictable_pages
    played(world, ("release", 0, True), ("evict",), ("evict",))
    assert free_pages(world) == 6


def test_a_hit_is_not_claimed_after_eviction():
    prompt = (0, 1, 0)
    world = ManagerWorld(ManagerScope(4, 1, 1, 4, (prompt,)))
    played(world, ("admit", prompt), ("grow", 0, None), ("release", 0, True))
    prefix = world.cache.prefix
    found = prefix.match(SCOPES[0], np.array(prompt, np.int32))
    assert found.num_tokens == 2
    assert prefix.evict(9) == 3
    for claim in (prefix.lock, prefix.record):
        with pytest.raises(DoubleFreeError):
            claim(found)
    queried = prefix.query_tokens
    played(world, ("admit", prompt))
    assert (prefix.hit_tokens, prefix.query_tokens - queried) == (0, 3)
    assert world.cache.page_table.kv_len(world.sequences[0].row) == 0


@pytest.mark.parametrize("page_size", [1, 2])
def test_a_full_pool_does_not_evict_the_chain_that_it_inserts(page_size):
    old, new = (0,) * 2 * page_size, (1,) * page_size
    world = ManagerWorld(ManagerScope(4, page_size, 1, 4 * page_size, (old, new)))
    played(world, ("admit", old), ("grow", 0, None), ("release", 0, True), ("admit", new), ("grow", 0, None))
    for _ in range(3 * page_size):  # from here on its pages are cached, and others' pages must make room
        played(world, ("publish", 0), ("grow", 0, 1))
    assert free_pages(world) == 0
    played(world, ("publish", 0), ("release", 0, True))
    match = world.cache.prefix.match(SCOPES[0], np.ones(4 * page_size, np.int32), whole=True)
    assert match.num_tokens == 4 * page_size


def test_retraction_at_every_offset_of_a_page():
    offsets = set()
    for length in range(1, 9):
        for other in range(1, 5):
            requests = (((0,) * length, 9, 0), ((1,) * other, 9, 0))
            world = arrived(SchedulerWorld(SchedulerScope(5, 4, 2, 8, requests)))
            replica, table = world.scheduler.replicas[0], world.cache.page_table
            retract = replica._retract

            def noted(request, retract=retract, table=table):
                offsets.add(table.computed_len(request.req_pool_idx) % 4)
                retract(request)

            replica._retract = noted
            driven(world)
            assert [len(request.output) for request in world.requests] == [9, 9]
    assert offsets == {0, 1, 2, 3}


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 16])
@pytest.mark.parametrize("context", [7, 8, 9])
@pytest.mark.parametrize("spare", [0, 1])
def test_chunk_context_and_pool_at_their_edges(budget, context, spare):
    """Chunks of a page less one, one and one more; contexts likewise of two pages; a pool that one request fills."""
    requests = tuple(((number,) * (context - new + 1), new, 0) for number, new in enumerate((1, 2, 5)))
    pages = -(-context // 4) + spare
    for overlaps in (False, True):
        world = driven(arrived(SchedulerWorld(SchedulerScope(pages, 4, 2, budget, requests))), overlaps=overlaps)
        assert [len(request.output) for request in world.requests] == [1, 2, 5]
        assert free_pages(world) + world.cache.prefix.cached_pages == pages


@pytest.mark.parametrize("page_size", [1, 2])
def test_bursts_of_short_prompts_through_few_slots(page_size):
    requests = tuple(((number % 3, number % 2)[: 1 + number % 2], 1 + number % 3, number % 2) for number in range(40))
    world = SchedulerWorld(SchedulerScope(8, page_size, 2, 4, requests))
    for first in range(0, 40, 10):
        played(world, *(("arrive", number) for number in range(first, first + 10)))
        played(world, *(("step", 0), ("step", 0), ("commit",)) * 2)
    driven(world)
    assert all(request.finish_reason is FinishReason.LENGTH for request in world.requests)
    assert world.cache.page_table.available_rows == 2
    assert not world.cache.held_tokens


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("at", [0, 1])
def test_an_abort_between_dispatch_and_commit(at, overlaps):
    world = arrived(SchedulerWorld(SchedulerScope(6, 1, 2, 4, (((0, 0), 3, 0), ((1, 0), 3, 0), ((1, 1), 2, 0)))))
    played(world, ("step", 0), *(("step", 0),) * overlaps, ("abort", at), ("step", 0), ("commit",))
    driven(world)
    assert [len(request.output) for request in world.requests if request.request_id != at] == [3, 2]
    assert world.requests[at].finish_reason is FinishReason.ABORT
    assert not world.cache.held_tokens
