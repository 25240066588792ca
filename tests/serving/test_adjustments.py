"""Penalties, biases, min-p and least lengths: each rule in float64, and whole answers against a loop on the host."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adjusting import adjusted_logits, answer_of, random_params
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_support import SCOPE, commit, make
from scheduler_support import request as scheduled
from serving_support import VOCAB, make_llama
from test_generation import LOGIT_TOLERANCE, random_prompts, small_llm

from engine.serving.device import sampler
from engine.serving.device.adjustments import RowAdjustments, adjusted, counted
from engine.serving.device.parcel import NOT_A_TOKEN, NOWHERE
from engine.serving.device.row_entries import CHUNK_TOKENS, ONCE_IN_ANSWER, chunks_of, empty_chunk
from engine.serving.request import FinishReason, Request
from engine.serving.sampling_params import SamplingParams

ROWS = 5
LARGEST = float(np.finfo(np.float32).max)
TIGHT = {"max_total_tokens": 64, "context_length": 60, "chunked_prefill_size": 8}  # two shapes of steps to compile
enter = jax.jit(RowAdjustments.entered)


@jax.jit
def choose_by(known, logits, rows, position, temperature, adjusts):
    return adjusted(logits, *known.of(rows), position, temperature, adjusts)


def entered(requests, *, known=None, vocab=VOCAB):
    """What the device knows when requests have been entered into their rows."""
    known = known or RowAdjustments.empty(ROWS, vocab)
    for each in requests:
        for chunk in chunks_of(each):
            known = enter(known, chunk)
    return known


def known_request(row, params, prompt, answer=(), stop_ids=()):
    each = Request(1, np.array(prompt, np.int32), params, frozenset(), SCOPE, req_pool_idx=row, output=list(answer))
    each.too_early = frozenset(stop_ids if params.min_tokens else ())
    return each


def adjust(known, requests, logits):
    """The logits by which the rows of ``requests``, in this order, choose."""
    rows = np.array([each.req_pool_idx for each in requests], np.int32)
    position = np.array([each.num_tokens for each in requests], np.int32)
    temperature = np.array([each.params.temperature for each in requests], np.float32)
    adjusts = position < [each.adjusts_until for each in requests]
    return np.asarray(choose_by(known, logits, rows, position, temperature, adjusts))


RULES = {
    "presence": {"presence_penalty": 1.7},
    "negative presence": {"presence_penalty": -1.7},
    "frequency": {"frequency_penalty": 0.6},
    "negative frequency": {"frequency_penalty": -0.6},
    "repetition": {"repetition_penalty": 1.8},
    "rewarded repetition": {"repetition_penalty": 0.4},
    "bias": {"logit_bias": {0: -100, 3: 2.5, VOCAB - 1: 100}},
    "least length": {"min_tokens": 60},
    "least length reached": {"min_tokens": 40},
    "min-p": {"min_p": 0.2, "temperature": 0.8},
    "min-p, hot": {"min_p": 0.9, "temperature": 30.0},
    "min-p, greedy": {"min_p": 0.2},
    "all": {
        "presence_penalty": 0.7,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.4,
        "logit_bias": {7: 3, 8: -3},
        "min_tokens": 60,
        "min_p": 0.05,
        "temperature": 1.1,
    },
    "plain": {},
}


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_that_of_float64(rule, seed):
    rng = np.random.default_rng(seed)
    params = SamplingParams(max_new_tokens=60, **RULES[rule])
    prompt, answer = rng.integers(0, VOCAB, 30), rng.integers(0, 20, 40).tolist()
    each = known_request(2, params, prompt, answer, stop_ids=rng.choice(VOCAB, 4, replace=False).tolist())
    logits = rng.normal(size=(1, VOCAB)).astype(np.float32) * 4
    expected = adjusted_logits(logits[0], prompt, answer, params, each.too_early)
    (got,) = adjust(entered([each]), [each], logits)
    at_edge = np.isneginf(got) != np.isneginf(expected)  # of min-p: a probability within rounding of the smallest
    np.testing.assert_allclose(got[~at_edge], expected[~at_edge], rtol=1e-5, atol=1e-5)
    if at_edge.any():
        probability = np.exp((logits[0, at_edge] - logits.max()) / params.temperature)
        np.testing.assert_allclose(probability, params.min_p, rtol=1e-4)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_rows_of_all_kinds_and_in_any_order_do_not_touch_one_another(seed):
    rng = np.random.default_rng(seed)
    requests = [
        known_request(
            row,
            random_params(rng, max_new_tokens=40, min_tokens=int(rng.choice([0, 0, 9])), min_p=0.0),
            rng.integers(0, VOCAB, rng.integers(1, 60)),
            rng.integers(0, VOCAB, rng.integers(0, 20)).tolist(),
            stop_ids=rng.choice(VOCAB, 3).tolist(),
        )
        for row in rng.permutation(ROWS)
    ]
    former = [known_request(row, SamplingParams(repetition_penalty=3.0), range(VOCAB), [5] * 9) for row in range(ROWS)]
    known = entered([each for each in requests if each.adjusts_until], known=entered(former))
    logits = rng.normal(size=(ROWS, VOCAB)).astype(np.float32) * 4
    for each, own, got in zip(requests, logits, adjust(known, requests, logits), strict=True):
        if each.adjusts_until:
            expected = adjusted_logits(own, each.prompt, each.output, each.params, each.too_early)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(got, own)


def test_a_request_of_many_tokens_comes_in_several_chunks():
    rng = np.random.default_rng()
    vocab = 5 * CHUNK_TOKENS
    params = SamplingParams(max_new_tokens=9, repetition_penalty=2.0, frequency_penalty=0.5, min_tokens=9)
    prompt, answer = rng.integers(0, vocab, 3 * CHUNK_TOKENS), rng.integers(0, 7, 5).tolist()
    each = known_request(3, params, prompt, answer, stop_ids=range(0, vocab, 3))
    assert len(list(chunks_of(each))) >= 3
    logits = rng.normal(size=(1, vocab)).astype(np.float32)
    (got,) = adjust(entered([each], vocab=vocab), [each], logits)
    np.testing.assert_allclose(got, adjusted_logits(logits[0], prompt, answer, params, each.too_early), rtol=1e-5)


def test_a_chunk_of_nobody_enters_nothing():
    before = entered([known_request(1, SamplingParams(repetition_penalty=2.0), [1, 2], [3])])
    after = enter(before, empty_chunk())
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_tokens_that_rows_chose_by_adjusted_logits_are_counted():
    tokens = jnp.zeros((ROWS, VOCAB), jnp.int32)
    rows = np.array([4, 0, 1, 2, NOWHERE], np.int32)
    chosen = np.array([9, 9, NOT_A_TOKEN, 8, 9], np.int32)
    adjusts = np.array([True, False, True, True, True])
    twice = counted(counted(tokens, rows, chosen, adjusts), rows, chosen, adjusts)
    expected = np.zeros((ROWS, VOCAB), np.int32)
    expected[4, 9] = expected[2, 8] = 2 * ONCE_IN_ANSWER
    np.testing.assert_array_equal(twice, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_adjusting_hides_no_logit_that_is_no_number(broken, temperature):
    """Not even of a token that is out, or biased away."""
    params = SamplingParams(
        max_new_tokens=9, min_tokens=9, min_p=0.5, logit_bias={6: -100}, repetition_penalty=5, temperature=temperature
    )
    requests = [known_request(row, params, [1, 2, 6], stop_ids=(5,)) for row in (0, 1, 2)]
    logits = np.random.default_rng().normal(size=(3, VOCAB)).astype(np.float32)
    logits[0, 5], logits[1, 6] = broken, broken
    if np.isneginf(broken):
        logits[:2] = broken
    inputs = sampler.SamplingInputs(
        np.full(3, temperature, np.float32), np.zeros(3, np.int32), np.ones(3, np.float32), *np.ones((2, 3), np.int32)
    )
    got = sampler.sample(jnp.asarray(logits), inputs, False, adjust(entered(requests), requests, logits)).tokens
    assert got[:2].tolist() == [NOT_A_TOKEN] * 2
    assert got[2] >= 0


@pytest.mark.parametrize("repetition", [1e-300, 1e-40, 100])
def test_the_largest_logits_and_penalties_stay_numbers(repetition):
    params = SamplingParams(repetition_penalty=repetition, frequency_penalty=2, logit_bias={0: 100, 1: -100})
    each = known_request(0, params, range(VOCAB), [2] * 10_000)
    logits = np.array([[LARGEST, -LARGEST, 3e38, -3e38, 0, -0.0, 1e-40, *np.linspace(-9, 9, VOCAB - 7)]], np.float32)
    got = adjust(entered([each]), [each], logits)
    assert np.isfinite(got).all()


def test_adjusting_runs_where_jax_is_strict():
    each = known_request(1, SamplingParams(**RULES["all"]), [1, 2], [3], stop_ids=(4,))
    logits = np.random.default_rng().normal(size=(1, VOCAB)).astype(np.float32)
    expected = adjust(entered([each]), [each], logits)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        known = RowAdjustments.empty(ROWS, VOCAB)
        for chunk in chunks_of(each):
            known = jax.jit(lambda known, chunk: known.entered(chunk))(known, chunk)
        one = np.ones(1, np.int32)
        got = jax.jit(lambda *a: adjusted(a[0], *known.of(one), *a[1:]))(logits, 3 * one, np.float32([1.1]), one > 0)
        jax.jit(lambda *a: counted(*a))(known.tokens, one, one, one > 0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


# What the plan tells the device.


def test_a_request_is_told_to_the_device_once_and_in_the_step_after_it_got_its_row():
    _, scheduler = make()
    plain, penalised = scheduled(1, 5), scheduled(2, 9, frequency_penalty=0.5)
    scheduler.add(plain)
    scheduler.add(penalised)
    told = []
    while scheduler.has_work:
        step = scheduler.next_step()
        (part,) = step.parts
        told.append(list(part.entered))
        if penalised in part.requests:
            at = part.requests.index(penalised)
            assert (part.adjusts is not None) == bool(part.samples[at])
            assert part.adjusts is None or part.adjusts.tolist() == [each is penalised for each in part.requests]
        commit(scheduler, step, np.full(3, 7, np.int32))
    assert told == [[penalised], *[[]] * (len(told) - 1)]


def test_a_row_that_was_given_back_before_the_next_step_is_not_told():
    _, scheduler = make()
    parent, child = (scheduled(number, 5, prompt=np.arange(5, dtype=np.int32), presence_penalty=1) for number in (1, 2))
    scheduler.add(parent)
    commit(scheduler, scheduler.next_step(), np.full(3, 7, np.int32))
    scheduler.fork(parent, child)
    assert child.req_pool_idx is not None
    scheduler.end(child, FinishReason.ABORT)
    assert list(scheduler.next_step().parts[0].entered) == []


def test_what_was_not_told_when_a_step_failed_is_told_when_the_requests_run_again():
    _, scheduler = make()
    requests = [scheduled(number, 5, presence_penalty=0.5) for number in (1, 2)]
    for each in requests:
        scheduler.add(each)
    assert list(scheduler.next_step().parts[0].entered) == requests
    scheduler.restart(requests)
    assert list(scheduler.next_step().parts[0].entered) == requests


@pytest.mark.parametrize("least", [0, 1, 3, 8])
def test_a_request_that_only_has_a_least_length_adjusts_until_its_answer_has_it(least):
    """Beside another one that decodes on, of which no step before or after it is planned anew."""
    _, scheduler = make()
    bounded = scheduled(1, 5, new=8, min_tokens=least)
    bounded.too_early = frozenset((3,) if least else ())
    scheduler.add(bounded)
    scheduler.add(scheduled(2, 5, new=12))
    adjusting, told, repeated = [], 0, []
    while scheduler.has_work:
        (part,) = (step := scheduler.next_step()).parts
        adjusting.append(part.adjusts is not None)
        told += len(part.entered)
        repeated.append(part.repeats)
        commit(scheduler, step, np.full(3, 7, np.int32))
    assert adjusting == [True] * least + [False] * (12 - least)
    assert told == (least > 0)
    anew = {0, 1, 8} | ({least} if 1 < least < 8 else set())  # a prompt, the first token fed, a change, an end
    assert {index for index, repeats in enumerate(repeated) if not repeats} == anew


def test_a_least_length_that_nothing_could_undercut_adjusts_nothing():
    _, scheduler = make()
    scheduler.add(scheduled(1, 5, new=8, min_tokens=8))
    step = scheduler.next_step()
    assert step.parts[0].adjusts is None
    assert not step.has_entered


def test_a_request_that_runs_again_with_its_least_length_is_not_told_to_the_device():
    _, scheduler = make()
    bounded = scheduled(1, 5, new=8, min_tokens=2)
    bounded.too_early = frozenset((3,))
    scheduler.add(bounded)
    for _ in range(2):
        commit(scheduler, scheduler.next_step(), np.full(3, 7, np.int32))
    scheduler.restart([bounded])
    step = scheduler.next_step()
    assert not step.has_entered
    assert step.parts[0].adjusts is None


# Whole answers.


@pytest.fixture(scope="module")
def llm(llama):
    return small_llm(llama)


@pytest.fixture(scope="module")
def tight(llama):
    return small_llm(llama, **TIGHT)


@pytest.fixture(scope="module")
def in_turn(llama):
    return small_llm(llama, **TIGHT, overlap_steps=False)


def all_answers(output):
    return [output.token_ids, *(sibling.token_ids for sibling in output.siblings)]


PENALISED = SamplingParams(
    max_new_tokens=14, presence_penalty=0.8, frequency_penalty=0.5, repetition_penalty=1.3, logit_bias={11: 1.5, 12: -2}
)


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_answers_are_those_of_a_loop_on_the_host_in_any_traffic(tight, in_turn, dense, seed):
    """Plain and adjusting requests, several answers, chunks of prompts, retractions; steps that overlap or not."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 7))
    prompts = [rng.integers(0, VOCAB, rng.integers(1, 40)).tolist() for _ in range(count)]
    prompts[-1][:20] = prompts[0][:20]
    params, stops = [], []
    for _ in prompts:
        stop = rng.choice(VOCAB, 4, replace=False).tolist() if rng.random() < 0.5 else []
        new = int(rng.integers(1, 20))
        least = int(rng.integers(0, new + 1)) if rng.random() < 0.5 else 0
        n = int(rng.choice([1, 1, 1, 3]))
        params.append(random_params(rng, max_new_tokens=new, min_tokens=least, stop_token_ids=stop, n=n))
        stops.append(stop)
    expected = [
        [answer_of(dense, prompt, param, stop_ids=stop, index=index) for index in range(param.n)]
        for prompt, param, stop in zip(prompts, params, stops, strict=True)
    ]
    for engine in (tight, in_turn):
        compiles = engine.compiles_after_warmup
        assert [all_answers(output) for output in engine.generate(prompts, params)] == expected
        engine.cache.check_integrity()
        assert engine.compiles_after_warmup == compiles


def test_a_penalised_answer_is_the_same_alone_beside_plain_ones_warm_and_in_chunks(llm, dense, dense_greedy):
    llm.cache.reset_prefix_cache()
    plain = SamplingParams(max_new_tokens=14)
    prompts = random_prompts([100, 7, 33], seed=np.random.default_rng().integers(2**32))
    expected = answer_of(dense, prompts[0], PENALISED)
    assert expected != dense_greedy(prompts[0], 14)
    (alone,) = llm.generate(prompts[:1], PENALISED)
    (warm,) = llm.generate(prompts[:1], PENALISED)
    llm.cache.reset_prefix_cache()
    together = llm.generate(prompts, [PENALISED, plain, plain])
    assert (alone.cached_tokens, warm.cached_tokens) == (0, 96)
    assert [answer.token_ids for answer in (alone, warm, together[0])] == [expected] * 3
    assert [answer.token_ids for answer in together[1:]] == [dense_greedy(prompt, 14) for prompt in prompts[1:]]


def test_a_retracted_request_keeps_its_penalties(tight, dense):
    retracted = tight.scheduler.retractions
    prompts = random_prompts([10, 12, 9, 11], seed=np.random.default_rng().integers(2**32))
    params = dataclasses.replace(PENALISED, max_new_tokens=25)
    outputs = tight.generate(prompts, params)
    assert tight.scheduler.retractions > retracted
    assert [output.token_ids for output in outputs] == [answer_of(dense, prompt, params) for prompt in prompts]


def test_a_penalised_request_that_waits_for_anothers_prefix_is_told_in_a_step_without_tokens(llm, dense, monkeypatch):
    """It comes while a step computes what both begin with and ends the other: the next one feeds nothing."""
    llm.cache.reset_prefix_cache()
    prompt = random_prompts([20], seed=np.random.default_rng().integers(2**32))[0]
    steps, next_step = [], llm.scheduler.next_step
    monkeypatch.setattr(llm.scheduler, "next_step", lambda **how: steps.append(next_step(**how)) or steps[-1])
    llm.add_request(prompt, SamplingParams(max_new_tokens=1))
    finished = llm.step()
    second = llm.add_request([*prompt, 5], PENALISED)
    while llm.scheduler.has_work:
        finished |= llm.step()
    assert [step.num_tokens for step in steps if any(part.entered for part in step.parts)] == [0]
    assert finished[second].token_ids == answer_of(dense, [*prompt, 5], PENALISED)


def test_more_requests_than_rows_take_turns_in_them(llm, dense, dense_greedy):
    rng = np.random.default_rng()
    prompts = random_prompts(rng.integers(1, 30, 14).tolist(), seed=rng.integers(2**32))
    params = [PENALISED if index % 3 == 1 else SamplingParams(max_new_tokens=5) for index in range(14)]
    for prompt, param, output in zip(prompts, params, llm.generate(prompts, params), strict=True):
        expected = answer_of(dense, prompt, param) if param is PENALISED else dense_greedy(prompt, 5)
        assert output.token_ids == expected


def test_nothing_that_ends_an_answer_is_chosen_before_its_least_length(dense, dense_greedy):
    prompt = random_prompts([12], seed=np.random.default_rng().integers(2**32))[0]
    ids = dense_greedy(prompt, 4)
    eos, stop = ids[2], ids[0]
    llm = small_llm(make_llama(eos_token_id=(eos,)), chunked_prefill_size=4)
    params = SamplingParams(max_new_tokens=30, min_tokens=6, stop_token_ids=(stop,))
    short, long, unstopped = llm.generate(
        [prompt] * 3, [dataclasses.replace(params, min_tokens=0), params, dataclasses.replace(params, ignore_eos=True)]
    )
    assert short.token_ids == [stop]
    assert not {eos, stop} & set(long.token_ids[:6])
    assert long.token_ids == answer_of(dense, prompt, params, stop_ids=(eos, stop))
    begun = unstopped.token_ids[:6]
    assert begun == answer_of(dense, prompt, dataclasses.replace(params, max_new_tokens=6), stop_ids=(eos, stop))
    rest = dataclasses.replace(params, max_new_tokens=24, min_tokens=0)
    assert unstopped.token_ids[6:] == answer_of(dense, prompt + begun, rest, stop_ids=(stop,))


def test_a_bias_keeps_a_token_out_or_forces_it(llm, dense_greedy):
    prompt = random_prompts([12], seed=np.random.default_rng().integers(2**32))[0]
    usual = dense_greedy(prompt, 8)
    for hot in (0.0, 0.7):
        params = [SamplingParams(max_new_tokens=8, temperature=hot, logit_bias=bias) for bias in
                  (dict.fromkeys(usual, -100), {3: 100})]  # fmt: skip
        without, forced = llm.generate([prompt] * 2, params)
        assert not set(without.token_ids) & set(usual)
        assert forced.token_ids == [3] * 8


def test_logprobs_and_logits_stay_those_of_the_model(llm, dense):
    prompt = random_prompts([21], seed=np.random.default_rng().integers(2**32))[0]
    params = dataclasses.replace(PENALISED, temperature=0.7, seed=5, min_p=0.1, logprobs=3)
    (output,) = llm.generate([prompt], params, return_logits=True)
    logits = dense(prompt + output.token_ids[:-1])[len(prompt) - 1 :].astype(np.float64)
    np.testing.assert_allclose(output.logits, logits, atol=LOGIT_TOLERANCE)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, token, got in zip(expected, output.token_ids, output.logprobs, strict=True):
        np.testing.assert_allclose([value for _, value in got.top], -np.sort(-row)[:3], atol=LOGIT_TOLERANCE)
        assert got.chosen == pytest.approx(row[token], abs=LOGIT_TOLERANCE)


class Untouched:
    """An adjuster that must not be asked for anything."""

    def __getattr__(self, name):
        raise AssertionError(f"a plain step asked for {name}")


def test_plain_steps_run_nothing_of_what_is_compiled_ahead_and_take_no_memory_for_it(llama, dense_greedy, monkeypatch):
    seen = []
    fresh = small_llm(llama, max_running_requests=2, chunked_prefill_size=2, on_compile=lambda *each: seen.append(each))
    assert seen == [(number, fresh.programs) for number in range(1, fresh.programs + 1)]
    assert fresh.compiles_after_warmup == 0
    with monkeypatch.context() as patched:
        patched.setattr(fresh._runner, "_adjuster", Untouched())
        prompts = random_prompts([40, 3, 17], seed=np.random.default_rng().integers(2**32))
        params = [SamplingParams(max_new_tokens=6, temperature=t, n=n) for t, n in ((0, 1), (0, 2), (1, 1))]
        outputs = fresh.generate(prompts, params)
    assert fresh._runner._adjuster._known is None
    fresh.generate(prompts, PENALISED)
    assert fresh._runner._adjuster._known is not None
    assert fresh.compiles_after_warmup == 0
    assert [output.token_ids for output in outputs[:2]] == [dense_greedy(prompt, 6) for prompt in prompts[:2]]


def test_only_steps_that_choose_a_token_by_adjusted_logits_adjust(llm, monkeypatch):
    calls = []
    for name in ("adjust", "count"):
        original = getattr(llm._runner._adjuster, name)
        monkeypatch.setattr(
            llm._runner._adjuster, name, lambda *a, name=name, original=original: calls.append(name) or original(*a)
        )
    llm.cache.reset_prefix_cache()
    prompt = random_prompts([100], seed=np.random.default_rng().integers(2**32))[0]
    steps = llm.stats.steps
    llm.generate([prompt], dataclasses.replace(PENALISED, max_new_tokens=5))
    assert llm.stats.steps - steps == 8  # four chunks, of which the last chooses the first token
    assert calls == ["adjust", "count"] * 5


def consumed(known):
    for array in jax.tree.leaves(known):
        array.delete()


@pytest.mark.parametrize("where", ["enter", "adjust", "count"])
@pytest.mark.parametrize("calls_before", [0, 2])
def test_answers_are_right_after_a_step_that_failed(llm, dense, dense_greedy, monkeypatch, where, calls_before):
    """The program that fails has consumed what the device knew of the rows."""
    llm.cache.reset_prefix_cache()
    prompts = random_prompts([9, 40, 14], seed=np.random.default_rng().integers(2**32))
    params = [PENALISED, SamplingParams(max_new_tokens=8), dataclasses.replace(PENALISED, n=3)]
    adjuster, left, failures = llm._runner._adjuster, [calls_before], []
    original = getattr(adjuster, where)

    def failing(*arguments):
        if left[0] == 0 and not failures:
            failures.append(where)
            consumed(adjuster._known)
            raise RuntimeError("the device ran out of memory")
        left[0] -= 1
        return original(*arguments)

    monkeypatch.setattr(adjuster, where, failing)
    outputs = llm.generate(prompts, params)
    assert failures == [where]
    assert all_answers(outputs[0]) == [answer_of(dense, prompts[0], PENALISED)]
    assert all_answers(outputs[1]) == [dense_greedy(prompts[1], 8)]
    assert all_answers(outputs[2]) == [answer_of(dense, prompts[2], PENALISED)] * 3
    llm.cache.check_integrity()


def test_the_words_that_steps_count_stay_in_their_memory(llm):
    prompt = random_prompts([5], seed=np.random.default_rng().integers(2**32))[0]
    llm.generate([prompt], PENALISED)
    places = {
        llm._runner._adjuster._known.tokens.unsafe_buffer_pointer()
        for _ in range(3)
        if llm.generate([prompt], PENALISED)
    }
    assert len(places) == 1
