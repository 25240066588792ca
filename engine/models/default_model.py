"""The small Llama that ships with the package, so that nothing has to be fetched: geometry and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from engine.models.model_config import ModelConfig
from engine.models.token_bytes import byte_alphabet

DEFAULT_MODEL_DIR: Final = Path(__file__).parent / "default"
"""Folder of the shipped checkpoint."""

BOS_TOKEN_ID: Final = 256
EOS_TOKEN_ID: Final = 257
_SPECIAL_TOKENS = {"<|begin_of_text|>": BOS_TOKEN_ID, "<|end_of_text|>": EOS_TOKEN_ID}


def default_config() -> ModelConfig:
    """The geometry of the shipped model: 0.8 M parameters, two query heads per KV head."""
    return ModelConfig(
        vocab_size=256 + len(_SPECIAL_TOKENS),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=BOS_TOKEN_ID,
        eos_token_id=(EOS_TOKEN_ID,),
    )


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer whose ids 0 to 255 are the bytes of the text; 256 begins a text and 257 ends it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in _SPECIAL_TOKENS])
    bos = next(iter(_SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=list(_SPECIAL_TOKENS.items())
    )
    return tokenizer
