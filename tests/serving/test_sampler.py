import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.serving.request import SamplingParams
from engine.serving.sampler import SamplingInputs, sample

VOCAB, ROWS = 12, 4
sample = jax.jit(sample)


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
        {"seed": -1},
        {"seed": 2**31},
        {"logprobs": 21},
        {"logprobs": -1},
        {"stop_token_ids": 5},
        {"stop_token_ids": "ab"},
        {"stop_token_ids": (1.5,)},
    ],
)
def test_a_wrong_sampling_value_is_named_with_its_rule(wrong):
    (name,) = wrong
    with pytest.raises(RequestError, match=f"{name}=.* is not allowed: it must be"):
        SamplingParams(**wrong)
