"""What a step that fails half way must not lose, and whose saved prefixes are whose."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from serving_support import make_llama
from test_generation import LOGIT_TOLERANCE, random_prompts, small_llm

from engine.config import EngineConfig
from engine.errors import ConfigError, RequestError
from engine.models.checkpoint import save_model
from engine.serving.build import weights_identity
from engine.serving.check import check_against_dense
from engine.serving.llm import LLM
from engine.serving.sampling_params import SamplingParams


class Boom(Exception):
    """What an injected fault raises."""


# Few programs to compile, for the engines that are made only to be told apart.
ONE_ROW = {"max_running_requests": 1, "chunked_prefill_size": 64, "max_total_tokens": 96, "host_tier_bytes": 1 << 20}


@pytest.fixture(scope="module")
def llm(llama):
    return small_llm(llama)


def boom(*_, **__):
    raise Boom


def step_until_it_fails(llm, finished):
    while True:
        finished |= llm.step()


def finish(llm, finished=()):
    finished = dict(finished)
    while llm.scheduler.has_work:
        finished |= llm.step()
    return finished


def test_a_request_that_ran_out_of_time_in_a_step_that_failed_is_reported_by_the_next(llm, monkeypatch):
    late = llm.add_request([1] * 30, SamplingParams(max_new_tokens=50, timeout=1e-6))
    other = llm.add_request([2] * 30, SamplingParams(max_new_tokens=2))
    with monkeypatch.context() as patched:
        patched.setattr(llm._runner, "step", boom)
        with pytest.raises(Boom):
            llm.step()
    finished = finish(llm)
    assert (finished[late].finish_reason, finished[other].finish_reason) == ("timeout", "length")


def test_a_fork_whose_copy_failed_computes_its_prompt_itself_and_none_is_forgotten(llm, dense_greedy, monkeypatch):
    llm.cache.reset_prefix_cache()
    prompt = random_prompts([30], seed=41)[0]
    ended = llm.add_request([3], SamplingParams(max_new_tokens=1))  # ends in the step before the one whose copy fails
    request_id = llm.add_request(prompt, SamplingParams(max_new_tokens=5, n=4))
    finished = {}
    with monkeypatch.context() as patched:
        patched.setattr(llm._runner, "copy", boom)
        with pytest.raises(Boom):
            step_until_it_fails(llm, finished)
    llm.cache.check_integrity()
    finished = finish(llm, finished)
    answers = [finished[request_id], *finished[request_id].siblings]
    assert [answer.token_ids for answer in answers] == [dense_greedy(prompt, 5)] * 4
    assert finished[ended].finish_reason == "length"
    assert llm.cache.held_tokens == 0


def test_a_request_aborted_while_generate_runs_gets_the_tokens_so_far(llm):
    def abort_first(done, total):
        if llm.scheduler.running and llm.scheduler.running[0].output:
            llm.abort(llm.scheduler.running[0].request_id)

    first, second = llm.generate([[1, 2], [3]], SamplingParams(max_new_tokens=4), on_progress=abort_first)
    assert first.finish_reason == "abort"
    assert len(first.token_ids) < 4
    assert second.finish_reason in ("abort", "length")
    assert llm.cache.held_tokens == 0


def test_a_request_aborted_after_it_ended_in_a_failed_step_was_reset(llm, monkeypatch):
    late = llm.add_request([1] * 30, SamplingParams(timeout=1e-6))
    llm.add_request([2], SamplingParams(max_new_tokens=1))
    with monkeypatch.context() as patched:
        patched.setattr(llm._runner, "step", boom)
        with pytest.raises(Boom):
            llm.step()
    llm.abort(late)
    assert late not in finish(llm)


def test_an_answer_whose_text_cannot_be_decoded_is_reported_once_it_can(llm, monkeypatch):
    ids = [llm.add_request([token], SamplingParams(max_new_tokens=2, n=n)) for token, n in ((4, 1), (5, 1), (6, 2))]
    before, calls = llm.stats.finished["length"], []

    class Text:
        def decode(self, tokens, *, prompt):
            calls.append(tokens)
            if len(calls) == 2:  # the first answer has been made, and must not be lost
                raise Boom
            return "text"

    monkeypatch.setattr(llm, "tokenizer", Text())
    with pytest.raises(Boom):
        finish(llm)  # the first two end in the same step, before anything was returned
    finished = finish(llm)
    assert sorted(finished) == ids
    assert [len(finished[request_id].siblings) for request_id in ids] == [0, 0, 1]
    assert llm.stats.finished["length"] == before + 4
    assert llm.generate([[6]], SamplingParams(max_new_tokens=1))[0].finish_reason == "length"  # the engine is idle


def test_engines_that_save_nothing_have_names_of_their_own(llama):
    assert len({weights_identity(EngineConfig(), llama) for _ in range(5)}) == 5


def test_an_engine_that_saves_is_named_by_what_its_model_holds(llama, tmp_path):
    saving = EngineConfig(prefix_cache_dir=str(tmp_path), host_tier_bytes=1)
    assert weights_identity(saving, make_llama()) == weights_identity(saving, llama)  # equal models share
    assert len({weights_identity(saving, make_llama(seed=seed)) for seed in range(5)}) == 5


@pytest.mark.slow
def test_saved_prefixes_of_replaced_weights_are_not_taken_for_those_of_other_ones(llama, tmp_path):
    """Each process counts its own weights epochs: the number alone names no weights."""
    options = {**ONE_ROW, "prefix_cache_dir": str(tmp_path)}
    prompt, params = random_prompts([60], seed=42), SamplingParams(max_new_tokens=2)
    first = small_llm(llama, **options)
    first.replace_weights(make_llama(seed=5))
    first.generate(prompt, params)
    assert first.save_prefix_cache() > 0
    second = LLM(
        llama, **{field.name: getattr(first.config, field.name) for field in dataclasses.fields(first.config)[1:]}
    )
    second.replace_weights(make_llama(seed=6))
    assert second.generate(prompt, params)[0].cached_tokens == 0


def test_new_weights_get_nothing_of_the_old_ones_from_the_host_either(llama):
    llm = small_llm(llama, **ONE_ROW)
    prompts, params = random_prompts([60, 60], seed=43), SamplingParams(max_new_tokens=2)
    for prompt in prompts:
        llm.generate([prompt], params)
    assert llm.cache.host_tier.held_pages > 0
    llm.replace_weights(make_llama(seed=5))
    assert [llm.generate([prompt], params)[0].cached_tokens for prompt in prompts] == [0, 0]
    llm.cache.check_integrity()


def test_equal_weights_get_saved_prefixes_back_whatever_file_or_object_they_are_in(llama, tmp_path):
    options = {**ONE_ROW, "prefix_cache_dir": str(tmp_path / "prefixes")}
    prompt, params = random_prompts([60], seed=47), SamplingParams(max_new_tokens=2)
    llm = small_llm(llama, **options)
    llm.generate(prompt, params)
    assert llm.save_prefix_cache() > 0
    save_model(llama, tmp_path)
    assert small_llm(tmp_path, **options).generate(prompt, params)[0].cached_tokens == 56


@pytest.mark.slow
def test_a_compute_dtype_shares_nothing_saved_with_another_whatever_the_pool_stores(tmp_path):
    options = {**ONE_ROW, "kv_cache_dtype": "float32", "prefix_cache_dir": str(tmp_path / "prefixes")}
    prompt, params = random_prompts([60], seed=48), SamplingParams(max_new_tokens=2)
    save_model(make_llama(), tmp_path, dtype=jnp.bfloat16)
    llm = small_llm(tmp_path, dtype="bfloat16", **options)
    llm.generate(prompt, params)
    assert llm.save_prefix_cache() > 0
    assert small_llm(tmp_path, dtype="float32", **options).generate(prompt, params)[0].cached_tokens == 0


@pytest.mark.slow
def test_the_same_object_changed_and_served_again_shares_nothing_saved(tmp_path):
    model, options = make_llama(), {**ONE_ROW, "prefix_cache_dir": str(tmp_path)}
    prompt, params = random_prompts([60], seed=49), SamplingParams(max_new_tokens=2)
    llm = small_llm(model, **options)
    llm.replace_weights(model)
    llm.generate(prompt, params)
    assert llm.save_prefix_cache() > 0
    second = small_llm(model, **options)
    nnx.update(model, nnx.state(make_llama(seed=5)))
    second.replace_weights(model)
    assert second.generate(prompt, params)[0].cached_tokens == 0


def test_a_setting_changed_in_the_served_object_is_refused_and_nothing_changes(llama):
    model = make_llama()
    llm = small_llm(model, **ONE_ROW)
    prompt, params = random_prompts([60], seed=49), SamplingParams(max_new_tokens=2)
    answer = llm.generate(prompt, params)[0]
    model.config = dataclasses.replace(model.config, rope_theta=5.0)
    with pytest.raises(ConfigError, match="rope_theta=5"):
        llm.replace_weights(model)
    model = make_llama()
    model.norm.epsilon = 0.5
    with pytest.raises(ConfigError, match="other settings"):
        llm.replace_weights(model)
    again = llm.generate(prompt, params)[0]
    assert (again.token_ids, again.cached_tokens) == (answer.token_ids, 56)


def test_weights_that_could_not_be_replaced_leave_the_old_ones_served(llama, monkeypatch):
    llm = small_llm(llama, **ONE_ROW)
    prompt, params = random_prompts([60], seed=50), SamplingParams(max_new_tokens=2)
    answer = llm.generate(prompt, params)[0]
    with monkeypatch.context() as patched:
        patched.setattr(llm.cache.prefix, "raise_weights_epoch", boom)
        with pytest.raises(Boom):
            llm.replace_weights(make_llama(seed=5))
    assert [llm.generate(prompt, params)[0].cached_tokens for _ in range(2)] == [0, 56]
    assert llm.generate(prompt, params)[0].token_ids == answer.token_ids
    other = make_llama(seed=5)
    llm.replace_weights(other)
    output = llm.generate(prompt, params, return_logits=True)[0]
    assert output.cached_tokens == 0
    assert check_against_dense(other, [output]).largest_difference <= LOGIT_TOLERANCE
    llm.check_integrity()


def test_weights_in_numpy_arrays_that_are_written_to_later_do_not_change_what_is_served():
    model, prompt, params = make_llama(), random_prompts([20], seed=51), SamplingParams(max_new_tokens=4)
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, jax.tree.map(np.array, nnx.to_pure_dict(state)))
    nnx.update(model, state)
    llm = small_llm(model, **ONE_ROW)
    answer = llm.generate(prompt, params)[0].token_ids
    for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model))):
        leaf += 1
    llm.reset_prefix_cache()
    assert llm.generate(prompt, params)[0].token_ids == answer


@pytest.mark.slow
def test_prefixes_that_were_saved_after_the_weights_were_replaced_come_back_to_those_weights(llama, tmp_path):
    options = {**ONE_ROW, "prefix_cache_dir": str(tmp_path)}
    prompt, params = random_prompts([60], seed=52), SamplingParams(max_new_tokens=2)
    llm = small_llm(llama, **options)
    for seed in (5, 6):
        llm.replace_weights(make_llama(seed=seed))
    expected = llm.generate(prompt, params)[0]
    assert llm.save_prefix_cache() > 0
    again = small_llm(make_llama(seed=6), **options).generate(prompt, params)[0]
    assert (again.cached_tokens, again.token_ids) == (56, expected.token_ids)
    assert small_llm(llama, **options).generate(prompt, params)[0].cached_tokens == 0


@pytest.mark.parametrize("salt", ["\ud83d\ude00", "\ud800", 5, None, b""])
def test_a_salt_is_text(salt):
    with pytest.raises(RequestError, match="tenant_salt="):
        SamplingParams(tenant_salt=salt)


@pytest.mark.parametrize("priority", [2**31, -(2**31), 10**400, 1.5, True])
def test_a_priority_is_a_whole_number_of_32_bits(priority):
    with pytest.raises(RequestError, match="priority="):
        SamplingParams(priority=priority)


def test_a_copy_that_failed_does_not_lose_the_siblings_of_another_leader(llm, dense_greedy, monkeypatch):
    llm.cache.reset_prefix_cache()
    prompts, lengths = random_prompts([10, 9], seed=44), (4, 1)  # the second leader ends in the step that fails
    params = [SamplingParams(max_new_tokens=new, n=2) for new in lengths]
    ids = [llm.add_request(*each) for each in zip(prompts, params, strict=True)]
    with monkeypatch.context() as patched:
        patched.setattr(llm._runner, "copy", boom)
        with pytest.raises(Boom):
            finish(llm)
    finished = {}
    for _ in range(20):
        finished |= llm.step()
    for request_id, prompt, new in zip(ids, prompts, lengths, strict=True):
        answers = [finished[request_id], *finished[request_id].siblings]
        assert [answer.token_ids for answer in answers] == [dense_greedy(prompt, new)] * 2
    assert llm.cache.held_tokens == 0


def test_a_fork_that_failed_to_make_room_starts_later(llm, dense_greedy, monkeypatch):
    prompt = random_prompts([10], seed=45)[0]
    request_id = llm.add_request(prompt, SamplingParams(max_new_tokens=3, n=3))
    with monkeypatch.context() as patched:
        patched.setattr(llm.cache, "fork", boom)  # as when the page that it evicts cannot be saved
        with pytest.raises(Boom):
            finish(llm)
    finished = finish(llm)
    answers = [finished[request_id], *finished[request_id].siblings]
    assert [answer.token_ids for answer in answers] == [dense_greedy(prompt, 3)] * 3
    assert llm.cache.held_tokens == 0


@pytest.mark.parametrize("where", ["advance", "finish"])
def test_a_step_whose_prefixes_cannot_be_cached_is_booked_all_the_same(llm, dense_greedy, monkeypatch, where):
    """In overlap too: the step that was dispatched meanwhile goes on from the tokens of this one."""
    llm.cache.reset_prefix_cache()
    prompts, lengths = random_prompts([10, 9, 3], seed=46), (1, 2, 6)
    params = [SamplingParams(max_new_tokens=new) for new in lengths]
    ids = [llm.add_request(*each) for each in zip(prompts, params, strict=True)]
    finished, failures = {}, 0
    monkeypatch.setattr(llm.cache.prefix, where, boom)
    while llm.scheduler.has_work:
        try:
            finished |= llm.step()
        except Boom:
            failures += 1
        llm.cache.check_integrity()
    finished |= llm.step()  # a request that ended in a step that failed is reported by the next
    assert failures > 0
    for request_id, prompt, new in zip(ids, prompts, lengths, strict=True):
        assert finished[request_id].token_ids == dense_greedy(prompt, new)
    assert llm.cache.held_tokens == 0


def lose_the_pool(llm, times):
    """Steps that fail on the device after the pool was donated to them: its buffers are gone."""
    step, left = llm._runner.step, [times]

    def failing(*arguments):
        if left[0]:
            left[0] -= 1
            for buffer in (*llm.pool.buffers, llm._runner.rows.page_table):
                buffer.delete()
            raise RuntimeError("the device ran out of memory")
        return step(*arguments)

    return failing


@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_device_error_after_the_pool_was_donated_costs_no_answer(llm, dense_greedy, monkeypatch, steps_before):
    prompts = random_prompts([9, 40, 14], seed=51)
    cached, params = prompts[0] + [1], SamplingParams(max_new_tokens=8)
    llm.generate([cached], params)  # what is cached of it is lost with the pool, and must not be served
    ids = [llm.add_request(prompt, params) for prompt in prompts]
    finished, compiles = {}, llm.compiles_after_warmup
    for _ in range(steps_before):
        finished |= llm.step()
    with monkeypatch.context() as patched:
        patched.setattr(llm._runner, "step", lose_the_pool(llm, 1))
        with pytest.raises(RuntimeError, match="out of memory"):
            llm.step()
        finished |= finish(llm)
    assert [finished[i].token_ids for i in ids] == [dense_greedy(p, 8) for p in prompts]
    assert llm.generate([cached], params)[0].token_ids == dense_greedy(cached, 8)
    assert llm.compiles_after_warmup == compiles
    assert llm.cache.held_tokens == 0


def test_generate_goes_on_by_itself_after_a_step_that_failed(llm, dense_greedy, monkeypatch):
    prompts = random_prompts([9, 40, 14], seed=52)
    monkeypatch.setattr(llm._runner, "step", lose_the_pool(llm, 2))
    outputs = llm.generate(prompts, SamplingParams(max_new_tokens=8))
    assert [output.token_ids for output in outputs] == [dense_greedy(p, 8) for p in prompts]


def test_a_device_that_always_fails_ends_every_request_with_the_error(llm, dense_greedy, monkeypatch):
    prompts = random_prompts([9, 40, 14, 3, 6, 8], seed=53)
    with monkeypatch.context() as patched:
        patched.setattr(llm._runner, "step", lose_the_pool(llm, 10**6))
        outputs = llm.generate(prompts, SamplingParams(max_new_tokens=8, n=2))
    for output in outputs:
        for answer in (output, *output.siblings):
            assert (answer.finish_reason, answer.token_ids) == ("error", [])
            assert answer.error == "RuntimeError: the device ran out of memory"
    llm.check_integrity()
    assert llm.generate(prompts[:1], SamplingParams(max_new_tokens=3))[0].token_ids == dense_greedy(prompts[0], 3)


@pytest.mark.parametrize("where", ["admit", "fill", "grow"])
def test_one_culprit_ends_with_its_error_and_never_stops_the_others(llm, dense_greedy, monkeypatch, where):
    """Whatever raises for it: where it is let in, in the parcel of a step of several, or where rows grow."""
    llm.reset_prefix_cache()
    prompts, bad = random_prompts([9, 40, 14], seed=54), [96] * 13
    owner = {"admit": llm.cache, "fill": llm._stepper._batcher, "grow": llm.cache}[where]
    original = getattr(owner, where)

    def concerns_bad(first, *rest):
        if where == "admit":
            return list(rest[0][:13]) == bad
        rows = first.parts[0].req_pool_idx if where == "fill" else first
        return any(r.req_pool_idx in set(rows.tolist()) and list(r.prompt) == bad for r in llm.scheduler.running)

    def failing(*arguments, **named):
        if concerns_bad(*arguments):
            raise Boom("this one")
        return original(*arguments, **named)

    monkeypatch.setattr(owner, where, failing)
    outputs = llm.generate([prompts[0], bad, *prompts[1:]], SamplingParams(max_new_tokens=8))
    assert (outputs[1].finish_reason, outputs[1].error) == ("error", "Boom: this one")
    assert [outputs[i].token_ids for i in (0, 2, 3)] == [dense_greedy(p, 8) for p in prompts]
    llm.check_integrity()
    assert llm.cache.held_tokens == 0


def test_an_answer_whose_text_can_never_be_decoded_comes_without_it(llm, monkeypatch):
    class Text:
        def decode(self, tokens, *, prompt):
            if len(tokens) == 1:
                return "text"
            raise Boom("no such text")

    monkeypatch.setattr(llm, "tokenizer", Text())
    first, second = llm.generate([[4], [5]], [SamplingParams(max_new_tokens=n) for n in (1, 8)])
    assert (first.text, first.finish_reason, first.error) == ("text", "length", None)
    assert (second.text, second.finish_reason, second.error) == ("", "length", "Boom: no such text")
    assert len(second.token_ids) == 8


def test_a_request_that_is_added_while_generate_runs_is_reported_by_step(llm, dense_greedy):
    prompts, added = random_prompts([9, 12, 7], seed=55), []

    def on_progress(done, total):
        if not added:
            added.append(llm.add_request(prompts[2], SamplingParams(max_new_tokens=2)))

    params = [SamplingParams(max_new_tokens=n) for n in (9, 3)]
    outputs = llm.generate(prompts[:2], params, on_progress=on_progress)
    assert [len(output.token_ids) for output in outputs] == [9, 3]
    finished = llm.step()  # it ended while generate ran
    assert finished[added[0]].token_ids == dense_greedy(prompts[2], 2)
    assert not llm.scheduler.has_work


def test_a_request_that_outlives_the_generate_it_was_added_to_goes_on(llm, dense_greedy):
    prompts, added = random_prompts([9, 12], seed=56), []

    def on_progress(done, total):
        if not added:
            added.append(llm.add_request(prompts[1], SamplingParams(max_new_tokens=20)))

    llm.generate(prompts[:1], SamplingParams(max_new_tokens=2), on_progress=on_progress)
    assert finish(llm)[added[0]].token_ids == dense_greedy(prompts[1], 20)


def test_threads_add_step_and_generate_and_each_gets_its_own_answers(llm, dense_greedy):
    prompts = random_prompts([9, 12, 7, 5, 20, 3], seed=57)
    begun, added, stepped = threading.Event(), {}, {}

    def others():
        begun.wait()
        for prompt in prompts[2:]:
            added[llm.add_request(prompt, SamplingParams(max_new_tokens=4))] = prompt
            stepped.update(llm.step())

    thread = threading.Thread(target=others)
    thread.start()
    outputs = llm.generate(prompts[:2], SamplingParams(max_new_tokens=40), on_progress=lambda *_: begun.set())
    thread.join()
    stepped |= finish(llm)
    stepped |= llm.step()
    assert [output.token_ids for output in outputs] == [dense_greedy(p, 40) for p in prompts[:2]]
    assert {i: answer.token_ids for i, answer in stepped.items()} == {i: dense_greedy(p, 4) for i, p in added.items()}


def test_a_fault_of_the_prefix_cache_that_breaks_the_books_is_put_right(llm, dense_greedy, monkeypatch):
    prompts = random_prompts([10, 9], seed=58)
    llm.reset_prefix_cache()

    def half_way(*_, **__):
        llm.cache.allocator.alloc(4)  # pages that are in no row and in no cache
        raise Boom

    with monkeypatch.context() as patched:
        patched.setattr(llm.cache.prefix, "advance", half_way)
        outputs = llm.generate(prompts, SamplingParams(max_new_tokens=6))
    assert [output.token_ids for output in outputs] == [dense_greedy(p, 6) for p in prompts]
    llm.check_integrity()
    assert llm.cache.held_tokens == 0
