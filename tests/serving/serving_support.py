import jax.numpy as jnp
from flax import nnx

from engine.models.decoder import Decoder
from engine.models.model_config import ModelConfig

VOCAB = 97


def make_llama(seed=0, **changes):
    geometry = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 192,
        "eos_token_id": (),
    }
    return Decoder(ModelConfig(**{**geometry, **changes}), dtype=jnp.float32, rngs=nnx.Rngs(seed))
