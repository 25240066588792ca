from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CheckpointError
from engine.models.default_model import BOS_TOKEN_ID, DEFAULT_MODEL_DIR, EOS_TOKEN_ID, default_config
from engine.models.text import Tokenizer, load_tokenizer


def default_tokenizer() -> Tokenizer:
    tokenizer = load_tokenizer(DEFAULT_MODEL_DIR)
    assert tokenizer is not None
    return tokenizer


TOKENIZER = default_tokenizer()
# The two special tokens are not bytes of a text; what spells them is kept out.
UNICODE = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|" not in text)


@given(UNICODE)
def test_any_text_survives_the_round_trip(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(UNICODE)
def test_token_ids_are_the_bytes_behind_the_token_that_begins_a_text(text: str) -> None:
    assert TOKENIZER.encode(text) == [BOS_TOKEN_ID, *text.encode()]


@given(st.lists(st.integers(0, 255)))
def test_bytes_that_are_not_utf8_become_replacement_characters(tokens: list[int]) -> None:
    assert TOKENIZER.decode(tokens) == bytes(tokens).decode("utf-8", errors="replace")


def test_half_a_character_decodes_and_the_other_half_completes_it() -> None:
    first, second = "é".encode()
    assert TOKENIZER.decode([104, first]) == "h\ufffd"
    assert TOKENIZER.decode([104, first, second]) == "hé"


def test_special_tokens_are_left_out_of_text() -> None:
    assert TOKENIZER.decode([BOS_TOKEN_ID, 104, 105, EOS_TOKEN_ID]) == "hi"


def test_the_vocabulary_is_the_models() -> None:
    assert TOKENIZER.vocab_size == default_config().vocab_size


def test_a_checkpoint_without_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "[1, 2]"])
def test_a_corrupt_tokenizer_is_refused_by_path(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
