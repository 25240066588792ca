"""A pretend model on real pages: what tests of scheduling share."""

import numpy as np

from engine.attention.metadata import locate_new_tokens
from engine.memory.manager import CacheManager
from engine.memory.scope import CacheScope, LayoutKey
from engine.serving.device.batcher import Batcher
from engine.serving.device.parcel import LAST_SAMPLED, NOWHERE
from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.replica import Replica
from engine.serving.plan.scheduler import Scheduler
from engine.serving.request import Request
from engine.serving.sampling_params import SamplingParams

PAGE, CONTEXT = 4, 64
SCOPE = CacheScope("model", 0, None, "", LayoutKey.of({"version": 1}))


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-6  # so that no two requests arrive at once
        return self.now


def make(size=64, slots=3, budget=16, policy="lru"):
    cache = CacheManager(size, PAGE, slots, CONTEXT, policy=policy)
    queue = RequestQueue()
    replica = Replica(cache, queue, max_running_requests=slots, max_step_tokens=budget)
    return cache, Scheduler([replica], queue, Clock())


def plan_every_step_anew(scheduler):
    """Makes a scheduler never repeat the step before."""
    for replica in scheduler.replicas:

        def plan(replica=replica, plan_running=replica.plan_running, **options):
            replica._repeats = 0
            return plan_running(**options)

        replica.plan_running = plan


def request(number, prompt_len, new=4, *, prompt=None, **params):
    prompt = np.arange(prompt_len, dtype=np.int32) + 100 * number if prompt is None else prompt
    return Request(number, prompt, SamplingParams(max_new_tokens=new, **params), frozenset(), SCOPE)


def run_step(scheduler):
    step = scheduler.next_step()
    return step, commit(scheduler, step, np.full(len(step.rows) + 2, 7, np.int32))


def commit(scheduler, step, tokens):
    finished = []
    scheduler.commit(step, tokens, finished)
    return finished


class PretendDevice:
    """Keeps page table and last tokens as the device does, from nothing but parcels."""

    def __init__(self, page_table, shapes):
        self.host = page_table
        self.batcher = Batcher(shapes)
        self.page_table = np.zeros((page_table.max_requests, page_table.max_pages), np.int32)

    def receive(self, step):
        return self.take(step.parts[0], *self.batcher.fill(step))

    def take(self, step, parcel, shape, earlier):
        for places, pages in [*earlier, (parcel.update_at, parcel.update_page)]:
            real = places != NOWHERE
            assert len(set(places[real].tolist())) == np.count_nonzero(real)
            self.page_table.reshape(-1)[places[real]] = pages[real]
        for row in step.req_pool_idx.tolist():
            held = self.host.row_pages(row)
            np.testing.assert_array_equal(self.page_table[row, : held.size], held)
        rows = np.where(parcel.req_pool_idx == NOWHERE, 0, parcel.req_pool_idx)
        where = locate_new_tokens(
            self.page_table[rows], parcel.cu_q_lens, parcel.kv_lens, num_tokens=shape.tokens, page_size=PAGE
        )
        return parcel, shape, *where


def check_step(step, device, received, slots, written):
    """Each parcel row leads through its pages to exactly the slots where its tokens were written."""
    parcel, shape, all_positions, out_cache_loc = received
    total = sum(row.count for row in step.rows)
    assert total <= shape.tokens
    assert len(step.rows) <= slots
    assert parcel.cu_q_lens[-1] == total
    assert (out_cache_loc[total:] == -1).all()
    assert len(set(out_cache_loc[:total].tolist())) == total
    for index, row in enumerate(step.rows):
        start, stop = parcel.cu_q_lens[index], parcel.cu_q_lens[index + 1]
        positions = all_positions[start:stop]
        np.testing.assert_array_equal(positions, np.arange(row.start, row.start + row.count))
        fed, known = parcel.token_ids[start:stop], row.request.tokens(row.start, row.start + row.count)
        sent = np.where(fed == LAST_SAMPLED, row.request.output[-1:] or 0, fed)
        np.testing.assert_array_equal(sent[: known.size], known)
        assert (fed[known.size :] == LAST_SAMPLED).all()  # what a step under way samples, the device alone knows
        for position, slot in zip(positions.tolist(), out_cache_loc[start:stop].tolist(), strict=True):
            written[slot] = (row.request, position)
        assert parcel.kv_lens[index] == row.start + row.count
        for position in range(parcel.kv_lens[index]):
            slot = int(device.page_table[parcel.req_pool_idx[index], position // PAGE]) * PAGE + position % PAGE
            writer, at = written[slot]
            assert at == position
            mine, theirs = (request.tokens(0, at + 1) for request in (row.request, writer))
            assert writer is row.request or np.array_equal(mine, theirs)
    assert (parcel.kv_lens[len(step.rows) :] == 0).all()
