import copy
import dataclasses
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.serving.device import sampler
from engine.serving.device.parcel import LAST_SAMPLED, NOT_A_TOKEN
from engine.serving.device.sampler import SamplingInputs, most_likely
from engine.serving.sampling_params import SamplingParams

VOCAB, ROWS = 12, 4
sample = jax.jit(sampler.sample)


def inputs(temperature=1.0, top_k=0, top_p=1.0, seed=0, position=0):
    def rows(value, dtype):
        return jnp.broadcast_to(jnp.asarray(value, dtype), (ROWS,))

    return SamplingInputs(
        temperature=rows(temperature, jnp.float32),
        top_k=rows(top_k, jnp.int32),
        top_p=rows(top_p, jnp.float32),
        seed=rows(seed, jnp.int32),
        position=rows(position, jnp.int32),
    )


def draw(logits, **how):
    return np.asarray(sample(logits, inputs(**how), False).tokens)


def random_logits(seed):
    return np.random.default_rng(seed).normal(size=(ROWS, VOCAB)).astype(np.float32) * 3


def nucleus(logits, temperature, top_k, top_p):
    """The tokens that may be drawn, and their probabilities, in float64."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[: top_k or len(order)]
    p = np.exp(scaled[kept] - scaled[kept].max())
    p /= p.sum()
    count = int(np.searchsorted(np.cumsum(p), top_p - 1e-6)) + 1
    return kept[:count], p[:count] / p[:count].sum()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.floats(0.05, 1.0),
)
def test_a_draw_stays_in_the_nucleus(seed, temperature, top_k, top_p):
    logits = random_logits(seed)
    drawn = draw(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    for row, token in zip(logits, drawn, strict=True):
        assert token in nucleus(row, temperature, top_k, min(1.0, top_p + 1e-5))[0]


def test_draws_follow_the_distribution():
    logits = np.repeat(random_logits(1)[:1], ROWS, axis=0)
    counts = np.zeros(VOCAB)
    for position in range(1500):
        drawn = sample(logits, inputs(0.8, 6, 0.9, seed=np.arange(ROWS), position=position), False)
        np.add.at(counts, np.asarray(drawn.tokens), 1)
    kept, expected = nucleus(logits[0], 0.8, 6, 0.9)
    # 6,000 draws: a frequency of p has a standard deviation of at most 0.0065; five of them.
    np.testing.assert_allclose(counts[kept] / counts.sum(), expected, atol=0.033)


def test_temperature_zero_is_greedy_beside_random_rows():
    logits = random_logits(2)
    drawn = draw(logits, temperature=np.array([0, 5, 0, 5]))
    assert drawn[0] == logits[0].argmax()
    assert drawn[2] == logits[2].argmax()


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = random_logits(3) * 1e4
    np.testing.assert_array_equal(draw(logits, temperature=1e-30), logits.argmax(-1))


def test_a_draw_depends_on_seed_and_position_and_not_on_the_row():
    logits = np.zeros((ROWS, VOCAB), np.float32)
    assert len(set(draw(logits, seed=7, position=3).tolist())) == 1
    seeds = [np.arange(ROWS), np.arange(ROWS) + 50]
    draws = {tuple(draw(logits, seed=seed, position=position)) for seed in seeds for position in range(4)}
    assert len(draws) == 8


def test_logprobs_are_of_the_models_own_distribution():
    logits = random_logits(4)
    got = sample(logits, inputs(temperature=2.5, top_k=3), True)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    np.testing.assert_allclose(got.logprob, exact[np.arange(ROWS), np.asarray(got.tokens)], atol=1e-5)
    np.testing.assert_array_equal(got.top_ids, np.argsort(-logits, axis=-1))
    np.testing.assert_allclose(got.top_logprobs, -np.sort(-exact, axis=-1), atol=1e-5)


# Rounding moves logits by a few units in the last place, which swaps neighbours in rank all over a vocabulary.
@pytest.mark.parametrize("how", [{}, {"top_p": 0.95}, {"top_k": 40}])
def test_logits_that_move_by_rounding_change_no_draw(how):
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(ROWS, 8192)).astype(np.float32)
    moved = logits + rng.uniform(-4e-6, 4e-6, logits.shape).astype(np.float32)
    assert (np.argsort(logits) != np.argsort(moved)).sum() > 20
    for position in range(128):
        at = {"temperature": 0.8, "seed": np.arange(ROWS), "position": position, **how}
        np.testing.assert_array_equal(draw(moved, **at), draw(logits, **at))


@pytest.mark.parametrize("how", [{}, {"top_p": 0.999}, {"top_k": 2}])
def test_two_tokens_that_change_places_are_drawn_as_before(how):
    logits = np.full((ROWS, VOCAB), -50, np.float32)
    logits[:, 3], logits[:, 8] = 1, np.nextafter(np.float32(1), np.float32(2))
    swapped = logits.copy()
    swapped[:, [3, 8]] = logits[:, [8, 3]]
    draws = [[draw(x, seed=np.arange(ROWS), position=at, **how) for at in range(16)] for x in (logits, swapped)]
    np.testing.assert_array_equal(*draws)
    assert set(np.ravel(draws)) == {3, 8}


@pytest.mark.parametrize(
    "setting",
    [
        lambda: jax.default_prng_impl("rbg"),
        lambda: jax.default_prng_impl("unsafe_rbg"),
        lambda: jax.threefry_partitionable(False),
        lambda: jax.enable_x64(True),
    ],
    ids=["rbg", "unsafe_rbg", "not partitionable", "x64"],
)
def test_no_setting_of_jax_changes_a_draw_or_its_dtype(setting):
    logits = np.random.default_rng(6).normal(size=(ROWS, 300)).astype(np.float32)
    how = [inputs(1.3, seed=np.arange(ROWS) + 5, position=at, top_p=top_p) for at in range(8) for top_p in (1, 0.9)]
    expected = [jax.device_get(sample(logits, rows, True)) for rows in how]
    with setting():
        fresh = jax.jit(sampler.sample)
        got = [jax.device_get(fresh(logits, rows, True)) for rows in how]
        noise = sampler._noise(how[0], 300)
    assert noise.dtype == np.float32
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("key", "count", "words"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_bits_are_those_that_threefry_publishes(key, count, words):
    assert tuple(map(int, sampler._hash(*map(jnp.uint32, (*key, *count))))) == words


def test_noise_is_gumbels_and_finite_and_the_same_whatever_the_row():
    how = inputs(seed=np.arange(ROWS) * 7919, position=2)
    noise = np.asarray(sampler._noise(how, 100_000), np.float64)
    assert -2.9 < noise.min() < -2.4
    assert 10 < noise.max() < 23
    # Standard deviations of mean and variance over 400,000: 0.002 and 0.0055; five of them.
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.03)
    alone = sampler._noise(inputs(seed=7919, position=2), 100_000)
    np.testing.assert_array_equal(alone[3], noise[1].astype(np.float32))


def kept(logits, **how):
    return np.asarray(jax.vmap(sampler._kept)(jnp.asarray(logits), inputs(**how)))


def test_of_equal_logits_at_the_edge_the_lower_ids_stay():
    logits = np.zeros((ROWS, 8), np.float32)
    logits[:, 6] = 1
    for how in ({"top_k": 4}, {"top_p": 0.5}, {"top_k": 4, "top_p": 0.999}):  # e / (e + 7) is 0.28, the others 0.103
        assert np.flatnonzero(kept(logits, **how)[0]).tolist() == [0, 1, 2, 6]
    signed = np.where(np.arange(8) % 2, np.float32(-0.0), np.float32(0))
    assert np.flatnonzero(kept(np.tile(signed, (ROWS, 1)), top_k=3)[0]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("top_k", [0, 5000, 5001, 2**31 - 1])
def test_nothing_is_left_out_that_was_not_asked_for(top_k):
    logits = np.random.default_rng(7).normal(size=(ROWS, 5000)).astype(np.float32)
    logits[0] = -17  # with this the sum of probabilities is 1 after the first of them already
    logits[0, 4000] = 0
    logits[1, ::2] = -np.inf
    assert kept(logits, top_k=top_k).all()
    assert (kept(logits, top_k=17).sum(-1) == 17).all()


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-30}, {"top_p": 1e-45}, {"temperature": 1e-38}])
def test_what_leaves_one_token_is_greedy(how):
    logits = random_logits(8)
    np.testing.assert_array_equal(draw(logits, seed=np.arange(ROWS), **how), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0, 1e-45, 1e-38, 1e-30, 1, 3e38])
@pytest.mark.parametrize("top_p", [1, 0.5])
def test_the_largest_logits_and_the_smallest_temperatures_overflow_nothing(temperature, top_p):
    logits = np.full((ROWS, VOCAB), -np.inf, np.float32)
    logits[:, 1:4] = -3e38, 3e38, 1
    logits[1] = [-3e38] * 5 + [-np.inf] * 7
    drawn = draw(logits, temperature=temperature, top_p=top_p, seed=np.arange(ROWS))
    # So hot that even these logits are near each other, but none that is -inf.
    assert set(drawn[[0, 2, 3]]) <= ({1, 2, 3} if temperature == 3e38 else {2})
    assert 0 <= drawn[1] < 5


@pytest.mark.parametrize("wants_logprobs", [False, True])
@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1}, {"top_p": 0.9}, {"top_k": 3}])
@pytest.mark.parametrize("broken", ["nan", "inf", "both", "nothing but -inf"])
def test_a_row_without_usable_logits_gets_no_token_and_harms_no_other(broken, how, wants_logprobs):
    logits = random_logits(9)
    logits[:, 4] = -np.inf  # is legal
    rows = inputs(**{"seed": 3, **how})
    expected = np.asarray(sample(logits, rows, wants_logprobs).tokens)
    logits[2, 7] = np.inf if broken in ("inf", "both") else np.nan
    logits[2, 9] = np.nan if broken == "both" else logits[2, 9]
    if broken == "nothing but -inf":
        logits[2] = -np.inf
    got = np.asarray(sample(logits, rows, wants_logprobs).tokens)
    assert got[2] == NOT_A_TOKEN
    np.testing.assert_array_equal(np.delete(got, 2), np.delete(expected, 2))
    assert (np.delete(got, 2) >= 0).all()


def test_the_greedy_choice_is_the_first_of_the_best():
    logits = np.array([[0, 2, 2, 1], [-1, -0.0, 0.0, -2], [5, -np.inf, 5, 5], [-3e38, -np.inf, -3e38, -3e38]])
    assert most_likely(jnp.asarray(logits, jnp.float32)).tolist() == [1, 1, 0, 0]


def test_no_token_is_no_token_that_the_device_has():
    assert NOT_A_TOKEN < 0
    assert NOT_A_TOKEN != LAST_SAMPLED


def test_the_sampler_runs_where_jax_is_strict():
    logits = random_logits(10)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        strict = jax.jit(sampler.sample)(logits, inputs(top_p=0.9, top_k=7, seed=2), True)
    np.testing.assert_array_equal(strict.tokens, draw(logits, top_p=0.9, top_k=7, seed=2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"min_p": 1.01},
        {"min_p": float("nan")},
        {"min_p": True},
        {"presence_penalty": 2.01},
        {"presence_penalty": -2.01},
        {"presence_penalty": float("nan")},
        {"presence_penalty": "high"},
        {"frequency_penalty": 2.01},
        {"frequency_penalty": -2.01},
        {"frequency_penalty": float("-inf")},
        {"frequency_penalty": None},
        {"repetition_penalty": 0},
        {"repetition_penalty": -1},
        {"repetition_penalty": 100.5},
        {"repetition_penalty": float("nan")},
        {"logit_bias": {1: 100.5}},
        {"logit_bias": {1: -100.5}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {1: True}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {2**31: 1}},
        {"logit_bias": {1.5: 1}},
        {"logit_bias": {"1": 1}},
        {"logit_bias": dict.fromkeys(range(301), 1)},
        {"logit_bias": [(1, 2, 3)]},
        {"logit_bias": 5},
        {"logit_bias": None},
        {"min_tokens": -1},
        {"min_tokens": 1.5},
        {"min_tokens": True},
        {"min_tokens": None},
        {"seed": -1},
        {"seed": 2**31},
        {"logprobs": 21},
        {"logprobs": -1},
        {"stop_token_ids": 5},
        {"stop_token_ids": "ab"},
        {"stop_token_ids": (1.5,)},
        {"stop_token_ids": (2**70,)},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": np.array([[1]])},
        {"stop_token_ids": None},
        {"stop_token_ids": [True]},
        {"max_new_tokens": True},
        {"max_new_tokens": None},
        {"temperature": True},
        {"temperature": float("inf")},
        {"temperature": 1e39},
        {"temperature": 10**5000},
        {"temperature": np.array([1.0])},
        {"top_p": float("nan")},
        {"top_p": np.float32("nan")},
        {"top_k": 2**31},
        {"top_k": 2.0},
        {"seed": 10**5000},
        {"seed": 0.5},
        {"seed": "x" * 1000},
        {"n": 0},
        {"n": 129},
        {"n": 10**9},
        {"logprobs": True},
        {"priority": 2**31},
        {"priority": float("nan")},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": True},
        {"ignore_eos": "no"},
        {"ignore_eos": 1},
        {"tenant_salt": None},
        {"tenant_salt": b"a"},
    ],
    ids=lambda wrong: f"{next(iter(wrong))}",
)
def test_a_wrong_sampling_value_is_named_with_its_rule(wrong):
    (name,) = wrong
    with pytest.raises(RequestError, match=f"{name}=.* is not allowed: it must be") as caught:
        SamplingParams(**wrong)
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_tokens", "did you mean 'max_new_tokens'"),
        ("topk", "did you mean 'top_k'"),
        ("zzz", "it knows frequency_penalty"),
    ],
)
def test_an_unknown_sampling_parameter_is_refused_with_the_nearest_one(name, hint):
    with pytest.raises(RequestError, match=f"SamplingParams has no '{name}'; {hint}"):
        SamplingParams(**{name: 1})


def test_more_tokens_are_not_asked_for_than_allowed():
    with pytest.raises(RequestError, match="min_tokens=65 exceeds max_new_tokens=64; lower it or raise that"):
        SamplingParams(min_tokens=65)
    assert SamplingParams(min_tokens=64).min_tokens == 64


@pytest.mark.parametrize(
    ("asked", "adjusts"),
    [
        ({}, False),
        ({"temperature": 1, "top_k": 3, "top_p": 0.5, "seed": 1, "logprobs": 2, "stop_token_ids": [1]}, False),
        ({"min_p": 0, "presence_penalty": 0, "repetition_penalty": 1, "logit_bias": {}, "min_tokens": 0}, False),
        ({"min_p": 0.1}, False),  # greedy requests do not read it
        ({"min_p": 0.1, "temperature": 0.1}, True),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"repetition_penalty": 0.9}, True),
        ({"logit_bias": {3: 0}}, True),
        ({"min_tokens": 1}, False),  # changes only the first tokens
    ],
)
def test_only_what_changes_logits_adjusts_them(asked, adjusts):
    assert SamplingParams(**asked).adjusts_logits == adjusts


def test_biases_are_pairs_in_the_order_of_their_tokens_however_they_are_given():
    given = [{7: 1, 3: np.float32(-2.5)}, [(7, 1.0), (3, -2.5)], ((np.int64(3), -2.5), (7, np.int8(1)))]
    assert {SamplingParams(logit_bias=bias).biases for bias in given} == {((3, -2.5), (7, 1.0))}


@pytest.mark.parametrize("biases", [[(1, 2), (1, 3)], [(1, 2), (np.int32(1), 2)], ""])
def test_biases_of_which_one_would_be_lost_are_refused(biases):
    with pytest.raises(RequestError, match="it must be a mapping of at most 300 token ids"):
        SamplingParams(logit_bias=biases)


def test_numpys_numbers_are_taken_as_pythons():
    given = {"max_new_tokens": np.int64(5), "temperature": np.float32(0.5), "top_k": np.uint8(3), "seed": np.int32(9)}
    given |= {"top_p": np.float16(0.5), "n": np.int16(2), "timeout": np.float64(2), "ignore_eos": np.True_}
    params = SamplingParams(**given, stop_token_ids=np.array([1, 2], np.uint64), logprobs=np.int8(1))
    plain = SamplingParams(
        max_new_tokens=5, temperature=0.5, top_k=3, seed=9, top_p=0.5, n=2, timeout=2.0, ignore_eos=True,
        stop_token_ids=(1, 2), logprobs=1,
    )  # fmt: skip
    assert params == plain
    assert hash(params) == hash(plain)
    for field in dataclasses.fields(params):
        assert type(getattr(params, field.name)) is type(getattr(plain, field.name))


def test_sampling_params_are_still_a_frozen_dataclass_with_a_signature():
    params = SamplingParams(3, temperature=1)
    assert dataclasses.replace(params, seed=2).seed == 2
    assert pickle.loads(pickle.dumps(params)) == copy.copy(params) == params
    assert "max_new_tokens" in inspect.signature(SamplingParams).parameters
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 1
