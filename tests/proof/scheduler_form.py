"""The form of a SchedulerWorld: that of its manager, and of requests, queue, replica and steps under way.

Beyond what ``manager_form`` leaves out, for the same reasons:

    times and clock          only the order of ranks decides, which is kept
    retractions, failures    counted for metrics and for a recovery that this world does not have
    answers that have ended  checked when they end, and read by nobody
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager_form import Names, entries_form, forest_form, lease_form, marks, pages_form, row_form

from engine.serving.request import RequestState

if TYPE_CHECKING:
    from scheduler_world import SchedulerWorld


def scheduler_form(world: SchedulerWorld) -> tuple[Any, ...]:
    names, replica, queue = Names(), world.scheduler.replicas[0], world.scheduler.queue
    table = world.cache.page_table
    running = sorted(replica.running, key=lambda request: request.request_id)
    rows = [request.req_pool_idx for request in running]
    owner = {row: request.request_id for row, request in zip(rows, running, strict=True)}
    pages = [row_form(world.cache, row, names) for row in rows]
    forest, nodes = forest_form(world.cache, names)
    handles: dict[int, int] = {}
    leases = [lease_form(world.cache, row, nodes, handles, names) for row in rows]
    ranked = sorted(world.requests, key=lambda request: request.rank)
    requests = [_request_form(request) for request in world.requests]
    live = [r.request_id for r in ranked if r.state in (RequestState.WAITING, RequestState.RUNNING)]
    device = tuple((tuple(world.fed[row]), world.last[row]) for row in rows)
    suspects = tuple((request.request_id, count) for request, count in queue._suspects)
    waits = replica._waits

    def step_form(step: Any) -> tuple[Any, ...] | None:
        """Of a step what is still for the request that it was planned for."""
        if step is None:
            return None
        good = table.generations(step.req_pool_idx) == step.generations
        whose = [
            owner.get(row, -1) if is_good else -1 for row, is_good in zip(step.req_pool_idx.tolist(), good, strict=True)
        ]
        columns = (step.starts, step.counts, step.on_device, step.samples, step.ends)
        rest = step.repeats, step.membership == table.membership
        return tuple(whose), tuple(tuple(column.tolist()) for column in columns), rest

    wait_forms = sorted(
        (owner[row], owner.get(wait.row, -1) if table._generation[wait.row] == wait.generation else -1,
         wait.common_tokens, wait.counts_hit)
        for row, wait in waits._waits.items()
    )  # fmt: skip
    computing = sorted(
        (place[1], owner.get(each.row, -1), each.tokens.tobytes(), each.length)
        for place, each in waits._computing.items()
    )
    places = sorted((owner.get(row, -1), place[1]) for row, place in waits._places.items())
    last = replica._last if replica._last and replica._last.membership == table.membership else None
    flights = tuple((step_form(step.parts[0]), tuple(tokens)) for step, tokens in world.flights)
    plan = (
        tuple([request.request_id for request in replica.running]), tuple([int(replica.planned[row]) for row in rows]),
        step_form(last), replica._repeats if last else 0, step_form(replica._unmarked),
        replica._ordered_at == table.membership, tuple(wait_forms), tuple(computing), tuple(places),
    )  # fmt: skip
    return (
        tuple(requests), tuple(live), tuple([r.request_id for r in queue.waiting]), suspects, plan, flights, device,
        tuple(pages), tuple(leases), forest, entries_form(world.cache, nodes, names),
        pages_form(world.cache, world.content, names), _wrong_rows(world, rows), marks(world.cache, rows),
    )  # fmt: skip


def _request_form(request: Any) -> tuple[Any, ...]:
    if request.state in (RequestState.ENDED, RequestState.NEW):
        return (str(request.state),)
    return str(request.state), tuple(request.output), request.cached_tokens is None


def _wrong_rows(world: SchedulerWorld, rows: list[int]) -> tuple[int, ...]:
    """The rows of which the device has another page than it was told, steps that are planned included."""
    table = world.cache.page_table
    wrong = []
    for row in rows:
        pages = table.pages_by_group(row)[:, : table._told.item(row)]
        if ((world.device_table[row, :, : pages.shape[1]] != pages) & (pages > 0)).any():
            wrong.append(row)
    return tuple(wrong)
