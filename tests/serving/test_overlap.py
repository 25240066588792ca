"""Steps that overlap: the host runs one step ahead of the device, and the answers are the same."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_generation import random_prompts, small_llm

from engine.serving.device.parcel import NOWHERE, SHARED_PAGES, ParcelShape, StepParcel
from engine.serving.sampling_params import SamplingParams

TIGHT = {"max_total_tokens": 48, "context_length": 60}


class Boom(Exception):
    """What an injected fault raises."""


@pytest.fixture(scope="module")
def llm(llama):
    return small_llm(llama)


@pytest.fixture(scope="module")
def tight(llama):
    return small_llm(llama, **TIGHT)


@pytest.fixture(scope="module")
def in_turn(llama):
    """The same engine, each step committed before the next is planned."""
    return small_llm(llama, **TIGHT, overlap_steps=False)


def flights(llm):
    return llm._stepper._flights


def run_to_flight(llm, prompts, params, *, tokens=1):
    """Adds requests and steps until each has so many committed tokens; one more step of each is under way."""
    ids = [llm.add_request(prompt, params) for prompt in prompts]
    while not all(len(r.output) >= tokens for r in llm.scheduler.running) or llm.scheduler.waiting:
        llm.step()
    assert len(flights(llm)) == 1
    assert len(flights(llm)[0].step.requests) == len(prompts)
    return ids


def finish(llm):
    finished = {}
    while llm.scheduler.has_work:
        finished |= llm.step()
    llm.cache.check_integrity()
    assert llm.cache.held_tokens == 0
    return finished


def poison_unowned(llm):
    """Fills every slot that no row and no cached prefix holds with NaN."""
    pages = llm.cache.allocator.pages.free_pages()
    slots = (pages[:, None] * llm.config.page_size + np.arange(llm.config.page_size)).reshape(-1)
    llm.pool.replace_buffers([buffer.at[slots].set(jnp.nan) for buffer in llm.pool.buffers])


def test_a_step_is_dispatched_before_the_one_before_it_is_read(llm):
    llm.add_request([1, 2, 3], SamplingParams(max_new_tokens=3))
    known = []
    while llm.scheduler.has_work:
        before = llm.stats.steps
        llm.step()
        known.append((len(flights(llm)), llm.stats.steps - before))
    # prompt and two tokens: three programs; each step but the first commits one, the last dispatches none
    assert known == [(1, 0), (1, 1), (1, 1), (0, 1)]


def test_without_overlap_a_steps_tokens_are_there_when_it_returns(in_turn):
    in_turn.add_request([1, 2, 3], SamplingParams(max_new_tokens=2))
    in_turn.step()
    assert [len(r.output) for r in in_turn.scheduler.running] == [1]
    assert not flights(in_turn)
    finish(in_turn)


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_answers_are_the_same_with_and_without_overlap(tight, in_turn, dense_greedy, data):
    """Stop tokens, sampling, several answers and a pool so tight that requests are retracted."""
    count = data.draw(st.integers(1, 5), label="requests")
    seed = data.draw(st.integers(0, 1000), label="seed")
    prompts = random_prompts([data.draw(st.integers(1, 24), label="length") for _ in range(count)], seed)
    params = []
    for prompt in prompts:
        greedy = data.draw(st.booleans(), label="greedy")
        stops = ()
        if greedy and data.draw(st.booleans(), label="stops"):
            stops = (dense_greedy(prompt, 9)[data.draw(st.integers(0, 8), label="stop")],)
        params.append(
            SamplingParams(
                max_new_tokens=data.draw(st.integers(1, 20), label="new"),
                temperature=0.0 if greedy else 1.0,
                seed=seed,
                n=data.draw(st.sampled_from([1, 1, 2]), label="n"),
                logprobs=data.draw(st.sampled_from([None, 2]), label="logprobs"),
                stop_token_ids=stops,
            )
        )
    for engine in (tight, in_turn):
        engine.reset_prefix_cache()
        poison_unowned(engine)
    ahead, sequential = (engine.generate(prompts, params) for engine in (tight, in_turn))
    for one, other in zip(ahead, sequential, strict=True):
        for a, b in zip((one, *one.siblings), (other, *other.siblings), strict=True):
            assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
            assert len(a.logprobs or ()) == len(b.logprobs or ())
    for engine in (tight, in_turn):
        engine.cache.check_integrity()
        assert engine.cache.held_tokens == 0


def test_what_follows_a_stop_token_is_dropped_and_its_page_serves_another(tight, dense_greedy):
    """The surplus token begins a page, which goes to the waiting request; nothing else may be in that page."""
    tight.reset_prefix_cache()
    poison_unowned(tight)
    prompts = random_prompts([6, 34, 30], seed=52)
    stop = dense_greedy(prompts[0], 3)[-1]
    stopping = SamplingParams(max_new_tokens=20, stop_token_ids=(stop,))
    params = [stopping, SamplingParams(max_new_tokens=6), SamplingParams(max_new_tokens=6)]
    retracted = tight.scheduler.retractions
    outputs = tight.generate(prompts, params, return_logits=True)
    expected = dense_greedy(prompts[0], 20)
    assert outputs[0].token_ids == expected[: expected.index(stop) + 1]
    assert [o.token_ids for o in outputs[1:]] == [dense_greedy(p, 6) for p in prompts[1:]]
    assert all(np.isfinite(output.logits).all() for output in outputs)
    assert [len(output.logits) for output in outputs] == [len(output.token_ids) for output in outputs]
    assert tight.scheduler.retractions == retracted


def test_an_abort_between_dispatch_and_commit_changes_no_other_answer(llm, dense_greedy):
    prompts = random_prompts([9, 14, 11], seed=53)
    ids = run_to_flight(llm, prompts, SamplingParams(max_new_tokens=8))
    llm.abort(ids[1])
    llm.cache.check_integrity()
    late = llm.add_request(prompts[1], SamplingParams(max_new_tokens=8))  # gets the row that is written to just now
    finished = finish(llm)
    assert sorted(finished) == [ids[0], ids[2], late]
    for request_id, prompt in ((ids[0], prompts[0]), (late, prompts[1]), (ids[2], prompts[2])):
        assert finished[request_id].token_ids == dense_greedy(prompt, 8)


def test_when_the_last_request_is_aborted_its_step_was_reset_and_idle_time_is_not_counted(llm):
    (request_id,) = run_to_flight(llm, [[1, 2, 3]], SamplingParams(max_new_tokens=9))
    llm.abort(request_id)
    assert not flights(llm)
    steps, seconds = llm.stats.steps, llm.stats.decode_seconds + llm.stats.prefill_seconds
    time.sleep(0.5)
    resumed = time.perf_counter()
    llm.generate([[4]], SamplingParams(max_new_tokens=1))
    assert llm.stats.steps == steps + 1
    worked = llm.stats.decode_seconds + llm.stats.prefill_seconds - seconds
    assert worked <= time.perf_counter() - resumed


def test_a_timeout_with_a_step_under_way_keeps_the_committed_tokens(llm, dense_greedy):
    prompts = random_prompts([9, 14], seed=54)
    ids = run_to_flight(llm, prompts, SamplingParams(max_new_tokens=8, timeout=1e9), tokens=3)
    llm.scheduler.clock = lambda: 1e12
    try:
        finished = llm.step()
    finally:
        llm.scheduler.clock = time.monotonic
    committed = [len(finished[i].token_ids) for i in ids]
    assert min(committed) >= 3
    assert [finished[i].token_ids for i in ids] == [dense_greedy(p, n) for p, n in zip(prompts, committed, strict=True)]
    assert [finished[i].finish_reason for i in ids] == ["timeout"] * 2
    assert not finish(llm)
    assert not flights(llm)


def test_a_retraction_waits_for_the_step_under_way(tight, dense_greedy, monkeypatch):
    settled = []
    (replica,) = tight.scheduler.replicas
    retract = replica._retract

    def note(request):
        settled.append(len(flights(tight)))
        retract(request)

    monkeypatch.setattr(replica, "_retract", note)
    prompts = random_prompts([10, 12, 9, 11], seed=55)
    outputs = tight.generate(prompts, SamplingParams(max_new_tokens=20))
    assert [o.token_ids for o in outputs] == [dense_greedy(p, 20) for p in prompts]
    assert settled
    assert set(settled) == {0}


@pytest.mark.parametrize("where", ["dispatch", "read"])
def test_a_step_that_fails_with_another_under_way_is_run_again(llm, dense_greedy, monkeypatch, where):
    prompts = random_prompts([9, 40], seed=56)
    ids = run_to_flight(llm, prompts, SamplingParams(max_new_tokens=8, logprobs=1), tokens=2)
    owned = [r.request_id for r in llm.scheduler.running]

    def boom(*_, **__):
        raise Boom

    with monkeypatch.context() as patched:
        if where == "dispatch":
            patched.setattr(llm._runner, "step", boom)
        else:
            flight = flights(llm)[0]
            unreadable = dataclasses.replace(flight.result, tokens=Unreadable())
            flights(llm)[0] = dataclasses.replace(flight, result=unreadable)
        with pytest.raises(Boom):
            llm.step()
    assert [r.request_id for r in llm.scheduler.waiting] == owned
    assert not flights(llm)
    llm.cache.check_integrity()
    finished = finish(llm)
    assert [finished[i].token_ids for i in ids] == [dense_greedy(p, 8) for p in prompts]
    assert [len(finished[i].logprobs) for i in ids] == [8, 8]


class Unreadable:
    """A result whose step failed on the device."""

    def __array__(self, *_, **__):
        raise Boom


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_the_devices_page_table_is_the_hosts_after_every_step(tight, seed, lengths):
    rng = np.random.default_rng(seed)
    pending = random_prompts(lengths, seed)
    pending[-1][:8] = pending[0][:8]
    while pending or tight.scheduler.has_work:
        if pending and rng.random() < 0.5:
            params = SamplingParams(max_new_tokens=int(rng.integers(1, 16)), n=int(rng.integers(1, 3)))
            tight.add_request(pending.pop(), params)
        if tight.scheduler.running and rng.random() < 0.1:
            tight.abort(tight._groups._leader_of[tight.scheduler.running[0].request_id].request_id)
        tight.step()
        for flight in flights(tight):
            check_device_rows(tight, flight.step)
    assert tight.cache.held_tokens == 0


def check_device_rows(llm, step):
    table = np.asarray(llm._runner.rows.page_table)
    (part,) = step.parts
    live = llm.scheduler.replicas[0]._still_run(part)
    for row in part.req_pool_idx[live].tolist():
        # A row that has taken cached pages for its own at a commit tells the device with its next step.
        told = llm.cache.page_table._told[row]
        np.testing.assert_array_equal(table[row, 0, :told], llm.cache.page_table.row_pages(row)[:told])


def test_the_host_does_not_change_a_parcel_after_it_is_sent(llm, dense_greedy, monkeypatch):
    """On the CPU jax may alias an aligned NumPy argument: a vector that is filled again would change a running step."""
    sent = []
    run = llm._runner.step

    def keep(parcel, shape, *rest):
        aligned = aligned_copy(parcel)
        assert aligned.packed.ctypes.data % 64 == 0
        sent.append((aligned.packed, aligned.packed.copy()))
        return run(aligned, shape, *rest)

    monkeypatch.setattr(llm._runner, "step", keep)
    prompts = random_prompts([9, 40, 17], seed=57)
    outputs = llm.generate(prompts, SamplingParams(max_new_tokens=8))
    assert [o.token_ids for o in outputs] == [dense_greedy(p, 8) for p in prompts]
    for packed, as_sent in sent:
        np.testing.assert_array_equal(packed, as_sent)
    addresses = [packed.ctypes.data for packed, _ in sent]
    assert len(set(addresses)) == len(addresses)


def aligned_copy(parcel):
    """The same parcel in memory that jax would alias."""
    size = parcel.packed.size
    raw = np.empty(size + 16, np.int32)
    start = (-raw.ctypes.data % 64) // 4
    raw[start : start + size] = parcel.packed
    return dataclasses.replace(parcel, packed=raw[start : start + size])


def test_parcels_share_no_memory():
    shape = ParcelShape(tokens=8, rows=4, updates=6)
    first, second = StepParcel.padding(shape), StepParcel.padding(shape)
    assert not np.shares_memory(first.packed, second.packed)
    for field in dataclasses.fields(StepParcel):
        assert np.shares_memory(getattr(first, field.name), first.packed)


def test_one_array_goes_to_the_device_a_step_and_one_comes_back(llm, monkeypatch):
    """Every argument of a compiled step but the parcel is on the device already; nothing else moves by itself."""
    run_to_flight(llm, random_prompts([9, 14, 11], seed=58), SamplingParams(max_new_tokens=30, temperature=0.7))
    compiles, sent, read = llm.compiles_after_warmup, [], []
    for name, program in counted_programs(llm._runner):
        monkeypatch.setattr(*name, counting(program, sent))
    original = np.asarray
    monkeypatch.setattr("engine.serving.stepper.np.asarray", lambda a, *_: read.append(a) or original(a))
    steps = llm.stats.steps
    with jax.transfer_guard_device_to_host("disallow"), jax.transfer_guard_device_to_device("disallow"):
        for _ in range(20):
            llm.step()
    assert llm.stats.steps - steps == 20
    assert len(sent) == 20
    assert len([array for array in read if isinstance(array, jax.Array)]) == 20
    assert all(array.shape == (llm.config.max_running_requests,) for array in read if isinstance(array, jax.Array))
    assert llm.compiles_after_warmup == compiles
    finish(llm)


def counted_programs(runner):
    shape = runner._shapes[0]
    yield (runner, "_sample"), runner._sample
    yield (runner, "_update_rows"), runner._update_rows
    yield (runner, "_steps"), {shape: runner._steps[shape]}


def counting(program, sent):
    """A program, or a table of them, that notes each array of the host's among its arguments."""
    if isinstance(program, dict):
        return {key: counting(value, sent) for key, value in program.items()}

    def call(*arguments):
        sent.extend(leaf for leaf in jax.tree.leaves(arguments) if not isinstance(leaf, jax.Array))
        return program(*arguments)

    return call


def test_more_shared_pages_than_a_parcel_holds_go_ahead_of_it(llama, dense_greedy):
    """Page size 1: a cached prefix of each of four prompts brings more pages than the step's parcel has room for."""
    llm = small_llm(llama, page_size=1)
    prompts = random_prompts([150] * 4, seed=59)
    params = SamplingParams(max_new_tokens=3)
    assert 2 * SHARED_PAGES < 4 * 149
    cold = llm.generate(prompts, params)
    compiles = llm.compiles_after_warmup
    warm = llm.generate(prompts, params)
    assert [o.cached_tokens for o in warm] == [149] * 4
    assert [o.token_ids for o in warm] == [o.token_ids for o in cold] == [dense_greedy(p, 3) for p in prompts]
    assert llm.compiles_after_warmup == compiles


def test_padding_is_nowhere():
    parcel = StepParcel.padding(ParcelShape(tokens=8, rows=4, updates=6))
    assert (parcel.req_pool_idx == NOWHERE).all()
    assert (parcel.update_at == NOWHERE).all()
    assert (parcel.kv_lens == 0).all()
