"""Weights that take the place of others: what is refused, and by which name."""

import re

import jax.numpy as jnp
import pytest
from flax import nnx

from engine.errors import ConfigError
from engine.models.decoder import Decoder
from engine.models.model_config import ModelConfig
from engine.models.replacement import require_replaceable
from engine.models.sharding import abstract_model, split_config

GEOMETRY = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
GEOMETRY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def make(dtype=jnp.float32, **changes):
    return Decoder(ModelConfig(**GEOMETRY | changes), dtype=dtype, rngs=nnx.Rngs(0))


def served(tp):
    return abstract_model(split_config(make().config, tp), jnp.dtype("float32"))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_weights_of_the_same_shapes_are_taken(tp):
    require_replaceable(make(), served(tp), tp)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers=1 where 2 is served"),
        ({"vocab_size": 64, "rope_theta": 5.0}, "vocab_size=64 where 48 is served; rope_theta=5.0 where 10000.0 is"),
        ({"dtype": jnp.bfloat16}, "dtype='bfloat16' where 'float32' is served"),
    ],
)
def test_another_geometry_is_refused_by_its_fields(tp, changes, message):
    with pytest.raises(ConfigError, match=message):
        require_replaceable(make(**changes), served(tp), tp)


@pytest.mark.parametrize("tp", [1, 4])
def test_a_parameter_of_a_wrong_shape_is_named_with_both_whole_shapes(tp):
    new = make()
    new.layers[1].self_attn.k_proj.kernel = nnx.Param(jnp.zeros((32, 24)))
    message = "layers.1.self_attn.k_proj.kernel is float32[32, 24] and must be float32[32, 16];"
    with pytest.raises(ConfigError, match=re.escape(message)):
        require_replaceable(new, served(tp), tp)
