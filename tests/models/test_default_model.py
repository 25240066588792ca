from __future__ import annotations

import json
import re

import numpy as np
import pytest
from random_model import jitted_logits

from engine.models.checkpoint import load_model
from engine.models.decoder import Decoder
from engine.models.default_model import DEFAULT_MODEL_DIR, byte_tokenizer, default_config
from engine.models.text import load_tokenizer
from engine.models.train import bits_per_byte
from engine.models.training_data import TRAINING_TEXT_DIR, consecutive_windows, load_texts


@pytest.fixture(scope="module")
def model() -> Decoder:
    return load_model(DEFAULT_MODEL_DIR, dtype="float32")


def test_the_shipped_checkpoint_is_what_the_training_command_writes(model: Decoder) -> None:
    assert model.config == default_config()
    shipped = json.loads((DEFAULT_MODEL_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    assert shipped == json.loads(byte_tokenizer().to_str())


def test_the_weights_fit_in_four_megabytes() -> None:
    assert (DEFAULT_MODEL_DIR / "model.safetensors").stat().st_size <= 4_000_000


def test_the_shipped_model_predicts_text_that_it_was_not_trained_on(model: Decoder) -> None:
    _, held_out = load_texts()
    # Random weights need 8 bits a byte, the frequencies of single letters 4.4; well trained it needs about 2.3.
    assert bits_per_byte(model, consecutive_windows(held_out, 256)) < 2.8


def test_long_contexts_are_predicted_no_worse_than_short_ones(model: Decoder) -> None:
    _, held_out = load_texts()
    context = model.config.max_position_embeddings
    long, short = (bits_per_byte(model, consecutive_windows(held_out, length)) for length in (context - 1, 64))
    # Positions that training never reached would cost bits; more context saves some.
    assert long < short


def test_greedy_text_is_made_of_words(model: Decoder) -> None:
    tokenizer = load_tokenizer(DEFAULT_MODEL_DIR)
    assert tokenizer is not None
    prompt, new_tokens = tokenizer.encode("Alice was beginning to"), 160
    padded = np.zeros(len(prompt) + new_tokens, np.int32)
    padded[: len(prompt)] = prompt
    for end in range(len(prompt), len(padded)):
        padded[end] = int(np.argmax(jitted_logits(model, padded)[end - 1]))
    known = set(re.findall(r"\w+", " ".join(path.read_text() for path in TRAINING_TEXT_DIR.glob("*.txt")).lower()))
    words = re.findall(r"\w+", tokenizer.decode(padded[len(prompt) :]).lower())
    # The last one may be cut short. Of random letters hardly any would be words.
    assert len(words) > 15
    assert np.mean([word in known for word in words[:-1]]) > 0.8
