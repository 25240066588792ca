"""Invariants of the whole engine on a small random Llama; every key and value lives in the fused, paged pool."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import settings_program
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_support import VOCAB, make_llama

from engine.errors import ConfigError, RequestError, RequestTooLarge
from engine.serving.check import check_against_dense
from engine.serving.llm import LLM
from engine.serving.sampling_params import SamplingParams

CHUNK = 32
# The logits are sums of float32 products in another order; their size is below 10.
LOGIT_TOLERANCE = 1e-4


def random_prompts(lengths, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def small_llm(llama, **options):
    return LLM(llama, **{"max_running_requests": 4, "chunked_prefill_size": CHUNK, "page_size": 4, **options})


@pytest.fixture(scope="module")
def llm(llama):
    return small_llm(llama)


@pytest.fixture(scope="module")
def tight(llama):
    """A pool smaller than what four requests would like."""
    return small_llm(llama, max_total_tokens=48, context_length=60)


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
def test_paged_equals_dense_for_every_page_size(llama, dense_greedy, page_size):
    llm = small_llm(llama, page_size=page_size)
    prompts = random_prompts([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5], seed=page_size)
    outputs = llm.generate(prompts, SamplingParams(max_new_tokens=7), return_logits=True)
    assert [output.token_ids for output in outputs] == [dense_greedy(prompt, 7) for prompt in prompts]
    check = check_against_dense(llama, outputs)
    assert check.tokens == 7 * len(prompts)
    assert check.largest_difference <= LOGIT_TOLERANCE
    llm.cache.check_integrity()
    assert llm.cache.held_tokens == 0


@settings(max_examples=25)
@given(data=st.data())
def test_paged_equals_dense_for_any_batch_and_any_order_of_pages(llm, dense_greedy, data):
    lengths = data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=6), label="prompt lengths")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    new = data.draw(st.lists(st.integers(1, 12), min_size=len(lengths), max_size=len(lengths)), label="new tokens")
    prompts = random_prompts(lengths, seed)
    shuffle_free_pages(llm, seed)
    outputs = llm.generate(prompts, [SamplingParams(max_new_tokens=count) for count in new])
    assert [o.token_ids for o in outputs] == [dense_greedy(p, n) for p, n in zip(prompts, new, strict=True)]
    assert {o.finish_reason for o in outputs} == {"length"}
    llm.cache.check_integrity()
    assert llm.cache.held_tokens == 0


def shuffle_free_pages(llm, seed):
    """Holds every page and gives them back in random order, a few at a time."""
    llm.cache.reset_prefix_cache()
    allocator, page_size = llm.cache.allocator, llm.config.page_size
    pages = allocator.alloc(llm.cache.size)[::page_size] // page_size
    for part in np.array_split(np.random.default_rng(seed).permutation(pages), 7):
        if len(part):
            allocator.free(part * page_size)


def test_an_answer_does_not_depend_on_other_requests_in_the_batch(llm):
    prompts = random_prompts([5, 40, 17, 80, 1], seed=3)
    params = SamplingParams(max_new_tokens=6, temperature=0.9, top_k=40, top_p=0.95, seed=11)
    together = llm.generate(prompts, params, return_logits=True)
    for prompt, shared in zip(prompts, together, strict=True):
        alone = llm.generate([prompt], params, return_logits=True)[0]
        assert alone.token_ids == shared.token_ids
        # Not bitwise: another number of rows takes another blocking of the matrix products.
        np.testing.assert_allclose(alone.logits, shared.logits, atol=LOGIT_TOLERANCE)


def test_steady_state_compiles_nothing_and_keeps_the_pool_in_place(llm):
    compiles, before = llm.compiles_after_warmup, [buffer.unsafe_buffer_pointer() for buffer in llm.pool.buffers]
    for params in (
        SamplingParams(max_new_tokens=5),
        SamplingParams(max_new_tokens=5, temperature=1.0, top_p=0.9, logprobs=3),
        SamplingParams(max_new_tokens=5, logprobs=0),
    ):
        llm.generate(random_prompts([1, 9, 33, 70, 100], seed=5), params)
    assert llm.compiles_after_warmup == compiles
    assert [buffer.unsafe_buffer_pointer() for buffer in llm.pool.buffers] == before


def test_the_compile_counter_counts(llm):
    before = llm.compiles_after_warmup
    jax.jit(lambda x: x * 3 + 1)(jnp.arange(7)).block_until_ready()
    assert llm.compiles_after_warmup > before


def test_what_other_pages_hold_never_reaches_an_answer(llm):
    prompts, params = random_prompts([3, 37, 64], seed=8), SamplingParams(max_new_tokens=6)
    llm.cache.reset_prefix_cache()
    expected = llm.generate(prompts, params, return_logits=True)
    llm.cache.reset_prefix_cache()  # what is cached must be read
    llm.pool.replace_buffers([jnp.full(buffer.shape, jnp.nan, buffer.dtype) for buffer in llm.pool.buffers])
    for got, want in zip(llm.generate(prompts, params, return_logits=True), expected, strict=True):
        np.testing.assert_array_equal(got.logits, want.logits)


def test_a_small_pool_makes_requests_wait_and_all_finish(tight, dense_greedy):
    prompts = random_prompts([30, 20, 36, 1, 10], seed=4)
    outputs = tight.generate(prompts, SamplingParams(max_new_tokens=8))
    assert [o.token_ids for o in outputs] == [dense_greedy(p, 8) for p in prompts]
    assert 0 < tight.stats.peak_held_tokens <= 48
    assert tight.cache.held_tokens == 0


def test_requests_enter_as_others_leave(llm):
    lengths = [2, 9, 9, 2, 2]
    ids = [llm.add_request([7, 8, 9], SamplingParams(max_new_tokens=length)) for length in lengths]
    order, finished = [], {}
    while len(finished) < 5:
        done = llm.step()
        order += sorted(done)
        finished |= done
        assert len(llm.scheduler.running) <= 4
    assert order == [ids[0], ids[3], ids[4], ids[1], ids[2]]
    assert [len(finished[i].token_ids) for i in ids] == lengths


def test_stop_tokens_end_an_answer(llm, dense_greedy):
    prompt = random_prompts([12], seed=2)[0]
    expected = dense_greedy(prompt, 10)
    stop = expected[4]
    output = llm.generate([prompt], SamplingParams(max_new_tokens=10, stop_token_ids=(stop,)))[0]
    assert output.token_ids == expected[: expected.index(stop) + 1]
    assert output.finish_reason == "stop"


def test_the_models_end_of_text_ends_an_answer_unless_ignored(dense_greedy):
    prompt = random_prompts([12], seed=2)[0]
    expected = dense_greedy(prompt, 10)
    llm = small_llm(make_llama(eos_token_id=(expected[3],)))
    first = expected.index(expected[3]) + 1
    stopped, ignored = llm.generate(
        [prompt, prompt], [SamplingParams(max_new_tokens=10), SamplingParams(max_new_tokens=10, ignore_eos=True)]
    )
    assert (stopped.token_ids, stopped.finish_reason) == (expected[:first], "stop")
    assert (ignored.token_ids, ignored.finish_reason) == (expected, "length")


def test_an_answer_is_cut_to_the_context(llm):
    output = llm.generate(random_prompts([170], 0), SamplingParams(max_new_tokens=1000))[0]
    assert len(output.token_ids) == 192 - 170
    assert output.finish_reason == "length"


def test_logprobs_are_those_of_the_dense_model(llm, dense):
    prompt = random_prompts([21], seed=6)[0]
    output = llm.generate([prompt], SamplingParams(max_new_tokens=4, logprobs=3, temperature=0.7, seed=5))[0]
    logits = dense(prompt + output.token_ids[:-1])[len(prompt) - 1 :].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, token, got in zip(expected, output.token_ids, output.logprobs, strict=True):
        best = np.argsort(-row)[:3]
        assert [token_id for token_id, _ in got.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in got.top], row[best], atol=LOGIT_TOLERANCE)
        assert got.chosen == pytest.approx(row[token], abs=LOGIT_TOLERANCE)


def test_only_requests_that_ask_for_logprobs_get_them(llm):
    params = [SamplingParams(max_new_tokens=2, logprobs=2), SamplingParams(max_new_tokens=2)]
    asked, silent = llm.generate(random_prompts([3, 3], 1), params)
    assert len(asked.logprobs) == 2
    assert silent.logprobs is None


def test_an_abort_gives_back_every_page(llm):
    prompts = random_prompts([70, 70, 5, 5], seed=9)
    ids = [llm.add_request(prompt, SamplingParams(max_new_tokens=20)) for prompt in prompts]
    llm.step()
    for request_id in (ids[1], ids[3]):  # one in the middle of its prompt, one waiting
        llm.abort(request_id)
        llm.cache.check_integrity()
    finished = {}
    for _ in range(60):
        finished |= llm.step()
    assert sorted(finished) == [ids[0], ids[2]]
    assert llm.cache.held_tokens == 0
    llm.abort(ids[0])  # has ended: nothing happens


def test_an_interrupted_call_leaves_no_page_behind(llm):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(random_prompts([40, 40, 40, 40], 1), on_progress=interrupt)
    assert llm.cache.held_tokens == 0
    assert not llm.scheduler.has_work


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([[1, 2]], "not a flat list"),
        ([[1], [2, 3]], "not a flat list"),
        ([1.5], "whole numbers"),
        ([0, VOCAB], f"token id {VOCAB} is outside the vocabulary; ids run from 0 to {VOCAB - 1}"),
        ([-1], "token id -1"),
        ([1] * 192, "192 tokens leaves no room for an answer in a context of 192 tokens; shorten it to at most 191"),
        ("text", "no tokenizer.json"),
    ],
)
def test_a_bad_prompt_is_refused_and_running_requests_are_unharmed(llm, dense_greedy, prompt, message):
    good = random_prompts([33], seed=7)[0]
    request_id = llm.add_request(good, SamplingParams(max_new_tokens=6))
    llm.step()
    with pytest.raises(RequestError, match=message):
        llm.add_request(prompt)
    finished = {}
    while not finished:
        finished = llm.step()
    assert finished[request_id].token_ids == dense_greedy(good, 6)
    with pytest.raises(RequestError, match=message):
        llm.generate([good, prompt])
    assert not llm.scheduler.has_work


def test_a_request_that_can_never_fit_is_refused_with_the_arithmetic(tight, dense_greedy):
    prompts = random_prompts([20, 39], seed=1)
    arithmetic = "needs 60 tokens of KV in whole pages, the pool has 48; lower max_new_tokens to 10"
    with pytest.raises(RequestTooLarge, match=arithmetic) as caught:
        tight.generate(prompts, SamplingParams(max_new_tokens=20))
    assert (caught.value.requested, caught.value.available) == (60, 48)
    assert not tight.scheduler.has_work
    assert tight.generate(prompts[1:], SamplingParams(max_new_tokens=5))[0].token_ids == dense_greedy(prompts[1], 5)


def test_generate_refuses_to_run_beside_added_requests(llm):
    request_id = llm.add_request([1, 2, 3])
    with pytest.raises(RequestError, match="1 added requests are unfinished"):
        llm.generate([[1]])
    llm.abort(request_id)
    assert llm.generate([]) == []


def test_one_string_is_no_list_of_prompts(llm):
    with pytest.raises(RequestError, match="prompts is one string"):
        llm.generate("hello")


def test_counts_of_prompts_and_params_must_agree(llm):
    with pytest.raises(RequestError, match="1 sampling_params for 2 prompts"):
        llm.generate([[1], [2]], [SamplingParams()])


@pytest.mark.parametrize(
    ("options", "message"), [({"page_sise": 4}, "did you mean 'page_size'"), ({"context_length": 193}, "192 positions")]
)
def test_a_bad_option_is_refused(llama, options, message):
    with pytest.raises(ConfigError, match=message):
        LLM(llama, **options)


def test_a_model_with_a_sliding_window_equals_dense():
    llama = make_llama(model_type="mistral", layer_windows=(9, 9))
    outputs = small_llm(llama).generate(
        random_prompts([1, 8, 50, 90], 3), SamplingParams(max_new_tokens=5), return_logits=True
    )
    check = check_against_dense(llama, outputs)
    assert check.largest_difference <= LOGIT_TOLERANCE
    assert check.argmax_differs == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_pool_of_16_bits_stays_near_dense(llama, dtype):
    outputs = small_llm(llama, kv_cache_dtype=dtype).generate(
        random_prompts([1, 30, 70], 3), SamplingParams(max_new_tokens=5), return_logits=True
    )
    # K and V are rounded to 8 bits of mantissa at the least; logits here are below 3.
    assert check_against_dense(llama, outputs).largest_difference <= 0.03


@pytest.mark.parametrize("steps_before", [0, 1, 4])
def test_an_interrupted_step_is_run_again_and_changes_no_answer(llm, dense_greedy, monkeypatch, steps_before):
    prompts = random_prompts([40, 9], seed=31)
    ids = [llm.add_request(prompt, SamplingParams(max_new_tokens=6)) for prompt in prompts]
    finished = {}
    for _ in range(steps_before):
        finished |= llm.step()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(llm._runner, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.step()
    llm.cache.check_integrity()
    while len(finished) < len(ids):
        finished |= llm.step()
    assert [finished[i].token_ids for i in ids] == [dense_greedy(p, 6) for p in prompts]
    assert llm.cache.held_tokens == 0


@pytest.mark.parametrize("params", [[None], ["greedy"]])
def test_sampling_params_must_be_sampling_params(llm, params):
    with pytest.raises(RequestError, match="sampling_params holds"):
        llm.generate([[1]], params)


def test_a_dtype_that_is_not_the_models_is_refused(llama):
    with pytest.raises(ConfigError, match="dtype='bfloat16' for a model of float32"):
        LLM(llama, dtype="bfloat16")


def test_a_cold_a_warm_and_a_half_warm_prefix_give_the_same_answer(llm, dense_greedy):
    llm.cache.reset_prefix_cache()
    first, second = random_prompts([77, 90], seed=21)
    second[:50] = first[:50]
    params = SamplingParams(max_new_tokens=6)
    cold = llm.generate([first, second[:60]], params, return_logits=True)
    hits = llm.cache.prefix.hit_tokens
    warm = llm.generate([first, second[:60], second], params, return_logits=True)
    assert [output.cached_tokens for output in warm] == [76, 56, 60]  # whole pages of 4, and one token to compute
    assert llm.cache.prefix.hit_tokens - hits == 76 + 56 + 60
    for before, after in zip(cold, warm, strict=False):
        assert after.token_ids == before.token_ids
        # Not bitwise: fewer rows take another blocking of the matrix products.
        np.testing.assert_allclose(after.logits, before.logits, atol=LOGIT_TOLERANCE)
    assert warm[2].token_ids == dense_greedy(second, 6)
    llm.cache.check_integrity()


def test_tenants_with_different_salts_share_nothing(llm):
    llm.cache.reset_prefix_cache()
    prompt = random_prompts([40], seed=22)[0]
    cached = [
        llm.generate([prompt], SamplingParams(max_new_tokens=1, tenant_salt=salt))[0].cached_tokens
        for salt in ("a", "b", "a")
    ]
    assert cached == [0, 0, 36]


def test_new_weights_never_see_what_the_old_ones_cached(llama):
    llm = small_llm(llama)
    prompt, params = random_prompts([40], seed=23), SamplingParams(max_new_tokens=4)
    llm.generate(prompt, params)
    other = make_llama(seed=5)
    llm.replace_weights(other)
    output = llm.generate(prompt, params, return_logits=True)[0]
    assert output.cached_tokens == 0
    assert check_against_dense(other, [output]).largest_difference <= LOGIT_TOLERANCE
    with pytest.raises(ConfigError, match="another geometry"):
        llm.replace_weights(make_llama(num_hidden_layers=1))


def test_retraction_changes_no_answer(tight, dense_greedy):
    prompts = random_prompts([10, 12, 9, 11], seed=24)
    before = tight.scheduler.retractions
    outputs = tight.generate(prompts, SamplingParams(max_new_tokens=20))
    assert tight.scheduler.retractions > before
    assert [o.token_ids for o in outputs] == [dense_greedy(p, 20) for p in prompts]
    tight.cache.check_integrity()
    assert tight.cache.held_tokens == 0


@pytest.fixture(scope="module")
def tiered(llama, tmp_path_factory):
    """A tight pool whose evicted pages go to the host and, on request, to a directory."""
    directory = tmp_path_factory.mktemp("prefixes")
    return small_llm(llama, max_total_tokens=96, host_tier_bytes=1 << 20, prefix_cache_dir=str(directory))


def test_pages_come_back_from_the_host_and_the_answer_is_the_same(tiered, dense_greedy):
    prompts = random_prompts([60, 60, 60], seed=25)
    params = SamplingParams(max_new_tokens=5)
    compiles = tiered.compiles_after_warmup
    cold = [tiered.generate([prompt], params)[0] for prompt in prompts]
    assert tiered.cache.host_tier.held_pages > 0  # two prompts do not fit the pool
    warm = [tiered.generate([prompt], params, return_logits=True)[0] for prompt in prompts]
    assert [o.cached_tokens for o in warm] == [56, 56, 56]
    assert [o.token_ids for o in warm] == [o.token_ids for o in cold] == [dense_greedy(p, 5) for p in prompts]
    assert tiered.compiles_after_warmup == compiles
    assert check_against_dense(tiered.model, warm).largest_difference <= LOGIT_TOLERANCE
    tiered.cache.check_integrity()


def test_a_new_engine_finds_the_prefixes_that_another_saved(tiered, llama):
    prompt = random_prompts([60], seed=26)
    params = SamplingParams(max_new_tokens=5)
    expected = tiered.generate(prompt, params)[0]
    assert tiered.save_prefix_cache() > 0
    restored = LLM(llama, **{f.name: getattr(tiered.config, f.name) for f in dataclasses.fields(tiered.config)[1:]})
    output = restored.generate(prompt, params)[0]
    assert output.cached_tokens == 56
    assert output.token_ids == expected.token_ids


def test_a_save_takes_what_the_device_holds_past_the_tier_and_leaves_it_cached(tiered, llama, tmp_path):
    page = tiered.plan.token_bytes * tiered.plan.buffers * tiered.pool.page_size
    prompt, params = random_prompts([60], seed=29), SamplingParams(max_new_tokens=5)
    options = {"max_running_requests": 1, "max_total_tokens": 96, "prefix_cache_dir": str(tmp_path)}
    llm = small_llm(llama, host_tier_bytes=2 * page, **options)
    expected, compiles = llm.generate(prompt, params)[0], llm.compiles_after_warmup
    cached = llm.cache.prefix.cached_pages
    for _ in range(2):  # a save replaces the one before by the same
        assert llm.save_prefix_cache() == 1
    assert llm.compiles_after_warmup == compiles
    assert (llm.cache.prefix.cached_pages, llm.cache.prefix.evicted_pages) == (cached, 0)
    assert llm.generate(prompt, params)[0].cached_tokens == 56
    llm.check_integrity()
    again = small_llm(llama, host_tier_bytes=100 * page, **options).generate(prompt, params)[0]
    assert (again.cached_tokens, again.token_ids) == (56, expected.token_ids)


def test_a_save_takes_what_is_on_its_way_to_the_host(tiered, llama):
    tiered.reset_prefix_cache()
    first, second = random_prompts([60, 90], seed=30)
    tiered.generate([first], SamplingParams(max_new_tokens=5))
    tiered.add_request(second, SamplingParams(max_new_tokens=5))
    while not tiered._stepper._mover._saves:  # the second pushes the first out
        tiered.step()
    tiered.save_prefix_cache()
    restored = LLM(llama, **{f.name: getattr(tiered.config, f.name) for f in dataclasses.fields(tiered.config)[1:]})
    assert restored.generate([first], SamplingParams(max_new_tokens=5))[0].cached_tokens == 56
    while tiered.scheduler.has_work:
        tiered.step()


def test_several_answers_share_the_pages_of_one_prompt(llm, dense):
    llm.cache.reset_prefix_cache()
    prompt = random_prompts([30], seed=27)[0]
    params = SamplingParams(max_new_tokens=8, temperature=1.0, seed=3, n=3)
    prefilled = llm.stats.prefill_tokens
    output = llm.generate([prompt], params, return_logits=True)[0]
    # The prompt once, and for each sibling its last token.
    assert llm.stats.prefill_tokens - prefilled == 30 + 2
    answers = [output, *output.siblings]
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    assert check_against_dense(llm.model, answers).largest_difference <= LOGIT_TOLERANCE
    for index, answer in enumerate(answers):
        alone = dataclasses.replace(params, seed=3 + index, n=1)
        assert llm.generate([prompt], alone)[0].token_ids == answer.token_ids
    llm.cache.check_integrity()
    assert llm.cache.held_tokens == 0


def test_more_answers_than_slots_take_turns(llm):
    output = llm.generate([[5, 6, 7]], SamplingParams(max_new_tokens=3, temperature=1.0, n=7))[0]
    assert [len(answer.token_ids) for answer in (output, *output.siblings)] == [3] * 7


def test_a_request_out_of_time_ends_and_gives_back_its_pages(llm):
    llm.add_request([1] * 50, SamplingParams(max_new_tokens=100, timeout=1e-6, n=2))
    (output,) = llm.step().values()
    assert (output.finish_reason, output.token_ids) == ("timeout", [])
    assert [sibling.finish_reason for sibling in output.siblings] == ["timeout"]
    assert llm.cache.held_tokens == 0


def test_saving_prefixes_needs_a_place(llm):
    with pytest.raises(ConfigError, match="nowhere to save"):
        llm.save_prefix_cache()


WARM = SamplingParams(max_new_tokens=12, temperature=1.0)


def test_without_a_seed_equal_prompts_get_another_draw_each_and_its_seed_repeats_it(llm):
    prompt = random_prompts([23], seed=40)[0]
    drawn = llm.generate([prompt] * 8, WARM)
    assert len({tuple(output.token_ids) for output in drawn}) == 8
    assert len({output.seed for output in drawn}) == 8
    again = llm.generate([prompt] * 8, WARM)
    assert {output.seed for output in again}.isdisjoint(output.seed for output in drawn)
    for output in drawn:  # alone, over a warm prefix, beside greedy neighbours
        repeated = dataclasses.replace(WARM, seed=output.seed)
        first, _ = llm.generate([prompt, prompt[:9]], [repeated, SamplingParams(max_new_tokens=5)])
        assert (first.token_ids, first.seed) == (output.token_ids, output.seed)


def test_a_seed_that_was_drawn_repeats_under_retraction_and_in_other_chunks(llm, tight):
    prompts = random_prompts([10, 12, 9, 11], seed=41)
    before = tight.scheduler.retractions
    drawn = tight.generate(prompts, dataclasses.replace(WARM, max_new_tokens=20))
    assert tight.scheduler.retractions > before
    seeds = [dataclasses.replace(WARM, max_new_tokens=20, seed=output.seed) for output in drawn]
    assert [o.token_ids for o in llm.generate(prompts, seeds)] == [o.token_ids for o in drawn]


def test_each_of_several_answers_reports_a_seed_of_its_own(llm):
    output = llm.generate([[3, 1, 4]], dataclasses.replace(WARM, n=4))[0]
    answers = [output, *output.siblings]
    assert [answer.seed for answer in answers] == [(output.seed + index) % 2**31 for index in range(4)]
    assert len({tuple(answer.token_ids) for answer in answers}) == 4
    for answer in answers:
        alone = llm.generate([[3, 1, 4]], dataclasses.replace(WARM, seed=answer.seed))[0]
        assert alone.token_ids == answer.token_ids


def test_a_generator_of_prompts_is_answered_in_its_order(llm, dense_greedy):
    prompts = random_prompts([5, 9, 3], seed=42)
    outputs = llm.generate((prompt for prompt in prompts), (SamplingParams(max_new_tokens=n) for n in (2, 3, 4)))
    assert [o.token_ids for o in outputs] == [dense_greedy(p, n) for p, n in zip(prompts, (2, 3, 4), strict=True)]
    assert {output.seed for output in outputs} == {0}
    with pytest.raises(RequestError, match="prompts is None; give a list of prompts"):
        llm.generate(None)


@pytest.fixture(scope="module", params=[True, False], ids=["overlapped", "in turn"])
def poisoned(request):
    """An engine whose model makes NaN of the last token of its vocabulary."""
    llama = make_llama()
    llama.embed_tokens.embedding[...] = llama.embed_tokens.embedding[...].at[VOCAB - 1].set(jnp.nan)
    return small_llm(llama, overlap_steps=request.param, chunked_prefill_size=4)


@pytest.mark.parametrize("how", [{}, {"logprobs": 2}, {"temperature": 1.0, "seed": 4, "top_p": 0.9, "logprobs": 1}])
def test_a_request_whose_logits_are_no_numbers_ends_and_harms_no_other(poisoned, how):
    llm, poison = poisoned, VOCAB - 1
    good = [[token % poison for token in prompt] for prompt in random_prompts([6, 40, 11], seed=43)]
    params = SamplingParams(max_new_tokens=8, **how)
    expected = llm.generate(good, params)
    bad = [5, poison, 7, 8]
    llm.cache.reset_prefix_cache()
    outputs = llm.generate([good[0], bad, good[1], [*good[2], poison], good[2]], params)
    for output in (outputs[1], outputs[3]):
        assert (output.finish_reason, output.token_ids, output.text) == ("non_finite", [], "")
        assert not output.logprobs
        assert "NaN or infinite" in output.error
    assert [outputs[i].token_ids for i in (0, 2, 4)] == [output.token_ids for output in expected]
    assert llm.cache.held_tokens == 0
    llm.cache.check_integrity()


@pytest.mark.slow
def test_no_setting_of_jax_changes_an_answer():
    settings = {
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    program = [sys.executable, settings_program.__file__]
    with subprocess.Popen(program, env=os.environ | settings, stdout=subprocess.PIPE) as other:
        expected = settings_program.answers()
        got = json.loads(other.communicate()[0])
    assert all(found for found in expected if isinstance(found, bool))  # pages came back from the host tier
    assert got == expected
