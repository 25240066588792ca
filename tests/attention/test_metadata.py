"""Which sequence a token is of, found by NumPy and by each of jax's two ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.attention.metadata import MOST_PAIRS, running_sum, sequence_of_tokens

FEW, MANY = (300, 40), (4096, 400)  # tokens and sequences


@pytest.mark.parametrize(("tokens", "sequences"), [FEW, MANY])
def test_few_and_many_pairs_give_what_numpy_does(tokens, sequences):
    rng = np.random.default_rng()
    bounds = np.sort(rng.integers(0, tokens, sequences + 1)).astype(np.int32)
    bounds[0], zeros = 0, int(rng.integers(1, sequences // 2))
    padded = np.concatenate([bounds[:-zeros], np.zeros(zeros, np.int32)])
    assert (
        (tokens * (sequences + 1) > MOST_PAIRS) == ((sequences + 1) ** 2 > MOST_PAIRS) == ((tokens, sequences) == MANY)
    )
    summed = jax.jit(running_sum)(padded)
    np.testing.assert_array_equal(summed, running_sum(padded))
    found = jax.jit(lambda each: sequence_of_tokens(each, num_tokens=tokens, xp=jnp))(summed)
    np.testing.assert_array_equal(found, sequence_of_tokens(np.asarray(summed), num_tokens=tokens))


@pytest.mark.parametrize(("tokens", "sequences"), [FEW, MANY])
def test_neither_way_has_a_loop(tokens, sequences):
    bounds = jax.ShapeDtypeStruct((sequences + 1,), jnp.int32)
    program = jax.jit(lambda each: sequence_of_tokens(each, num_tokens=tokens, xp=jnp)).lower(bounds).compile()
    assert "while(" not in program.as_text()
