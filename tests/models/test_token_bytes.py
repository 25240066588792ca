"""What single tokens spell: the bytes of all tokens together are the text's."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.models.default_model import byte_tokenizer
from engine.models.text import Tokenizer
from engine.models.token_bytes import TokenBytes


def byte_level():
    """Trained, so that tokens are longer than a byte and end within characters."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat, 猫はマットの上に座った"] * 3, trainer)
    return made


def sentencepiece():
    """Words with a sign for the blank before them, and bytes for characters that there are not."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁cat", "▁the", *"acehtr"]
    made = tokenizers.Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>"])
    return made


BACKENDS = {"shipped": byte_tokenizer(), "byte level": byte_level(), "sentencepiece": sentencepiece()}


@pytest.mark.parametrize("name", BACKENDS)
@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="▁"), max_size=30))
def test_the_bytes_of_the_tokens_are_those_of_the_text(name, text):
    backend = BACKENDS[name]
    ids = backend.encode(text, add_special_tokens=False).ids
    spelt = b"".join(map(TokenBytes(Tokenizer(backend)).of, ids))
    assert spelt.removeprefix(b" ") == text.encode().removeprefix(b" ")


def test_special_tokens_spell_their_names_and_unknown_ones_nothing():
    backend = BACKENDS["sentencepiece"]
    tokenizer = Tokenizer(backend)
    spelling = TokenBytes(tokenizer)
    assert spelling.of(backend.token_to_id("<s>")) == b"<s>"
    assert tokenizer.is_special(backend.token_to_id("<s>"))
    assert not tokenizer.is_special(backend.token_to_id("▁cat"))
    assert spelling.of(10**6) == b""


def test_a_name_of_a_byte_is_a_text_where_the_decoder_takes_it_for_one():
    backend = sentencepiece()
    backend.decoder = decoders.Metaspace()
    assert TokenBytes(Tokenizer(backend)).of(backend.token_to_id("<0x41>")) == b"<0x41>"
    assert TokenBytes(Tokenizer(backend)).of(backend.token_to_id("▁cat")) == b" cat"
