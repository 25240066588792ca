import jax
import numpy as np
import pytest
from flax import nnx
from serving_support import make_llama

from engine.models.dense import dense_logits


@pytest.fixture(scope="session")
def llama():
    return make_llama()


@pytest.fixture(scope="session")
def dense(llama):
    """The same weights without pool, pages or batch: token ids to float32 logits, one compile for all lengths."""
    graph, weights = nnx.split(llama)
    forward = jax.jit(lambda weights, tokens: dense_logits(nnx.merge(graph, weights), tokens))

    def logits(tokens):
        padded = np.zeros(llama.config.max_position_embeddings, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(forward(weights, padded))[: len(tokens)]

    return logits


@pytest.fixture(scope="session")
def dense_greedy(dense):
    """Greedy generation by recomputing everything for each token."""

    def generate(prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(dense(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    return generate
