"""Random models for the tests of this room."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from engine.models.decoder import Decoder
from engine.models.dense import dense_logits
from engine.models.model_config import ModelConfig

jitted_logits = jax.jit(dense_logits)
"""`dense_logits`, compiled once per geometry and length: op by op, each test would compile every operation."""


def random_model(config: ModelConfig, dtype: str = "float32", seed: int = 0) -> Decoder:
    """Return a model in which no parameter is constant, norms and biases included; the same numbers in any dtype."""
    model = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        center, spread = (1.0, 0.2) if len(leaf.shape) == 1 else (0.0, leaf.shape[0] ** -0.5)
        return jax.numpy.asarray(rng.normal(center, spread, leaf.shape).astype(np.float32), leaf.dtype)

    nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    return model
