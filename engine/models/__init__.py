"""Decoder-only language models in flax nnx, their checkpoints and their text.

A model holds no cache and knows no pages: attention is a function that its caller passes in. docs/models.md lists what
is supported.

    families                         what is special about each family, as data
    decoder                          the model, put together as its family says from these parts:
    self_attention, rotary, norm     projections around attention; rotary embedding and its scaling rules; norms
    mlp, experts, linear             the MLP, a mixture of experts, linear layers
    model_config, checked_values     its geometry, and checks of the values
    hf_config, hf_rope, layer_kinds  the geometry from a Hugging Face ``config.json``
    checkpoint                       weights from and to safetensors
    tensor_files, tensor_names       the files, and what they call a parameter
    mxfp4                            weights that are stored in four bits
    sharding                         which device holds which part of the weights
    fingerprint, replacement         whether two models compute the same; whether one can replace the other
    text, text_stream, token_bytes   tokenizer; the text of an answer while its tokens come; what single tokens spell
    dense                            the forward pass without a cache, as a check and for training
    default_model                    the small Llama that ships with the package
    train, training_data             how it was trained
"""

from engine.models.checkpoint import load_config, load_model
from engine.models.decoder import Decoder
from engine.models.default_model import DEFAULT_MODEL_DIR
from engine.models.dense import dense_logits
from engine.models.model_config import ModelConfig
from engine.models.text import Tokenizer, load_tokenizer

__all__ = [
    "DEFAULT_MODEL_DIR",
    "Decoder",
    "ModelConfig",
    "Tokenizer",
    "dense_logits",
    "load_config",
    "load_model",
    "load_tokenizer",
]
