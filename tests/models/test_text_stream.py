from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from test_text import KINDS
from tokenizers import decoders, models

from engine.errors import CheckpointError
from engine.models import text as text_module
from engine.models.text import CONTEXT_TOKENS, Tokenizer
from engine.models.text_stream import TextStream


def words(decoder: Any, *names: str) -> tokenizers.Tokenizer:
    vocabulary = {name: token for token, name in enumerate(("[S]", *names))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, "[S]"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["[S]"])
    return tokenizer


# Tokens of several bytes that begin, continue, end or are characters, or are none.
MERGED = ("a", "Ġ", "Ġa", "ðŁ", "ĺĢ", "ðŁĺ", "Ģ", "Ã©", "Ã", "©", "ÿ", "ï¿½", "Ģa", "à", "âĤ", "¬", "¬Ġb", "aâĤ")
EVERY_KIND = KINDS | {
    "byte level, merged": words(decoders.ByteLevel(), *MERGED),
    "word pieces": words(decoders.WordPiece(), "un", "##aff", "##", "'", "m", ".", "do", "not", "n't", "##not"),
    "ends of words": words(decoders.BPEDecoder("</w>"), "lo", "w</w>", "</w>", "a</w>", "b"),
    "spaces without bytes": words(decoders.Metaspace(), "▁a", "b▁", "▁", "▁▁", "c"),
    "no decoder": words(None, "a", "b", "lo", "é"),
}
FIRST_BYTE = {"byte level": 0, "sentencepiece": 3, "sentencepiece with bos": 3, "metaspace": 3}  # the token of byte 0
# Characters, parts of them, what is none, and a space.
SPELLED = [*(c.encode() for c in "é€😀▁\ufffd "), b"\xff", b"\x80", b"\xe0\x80", b"\xf0\x9f\x98", b"\xf4\x90\x80"]


def tokens_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Tokens as a model may choose them: special ones and ids without a token too, and any of them many times."""
    backend = EVERY_KIND[kind]
    any_token = st.integers(0, backend.get_vocab_size() + 2)
    parts: list[st.SearchStrategy[list[int]]] = [st.lists(any_token, max_size=3)]
    parts.append(st.builds(lambda token, times: [token] * times, any_token, st.integers(1, 3 * CONTEXT_TOKENS)))
    if (first := FIRST_BYTE.get(kind)) is not None:
        parts.append(st.sampled_from(SPELLED).map(lambda spelled: [first + byte for byte in spelled]))
        texts = st.text(st.sampled_from("ab lo me.é€😀"), min_size=1, max_size=6)
        parts.append(texts.map(lambda text: list(backend.encode(text, add_special_tokens=False).ids)))
    return st.lists(st.one_of(parts), max_size=10).map(lambda lists: [token for each in lists for token in each])


@pytest.mark.parametrize("kind", EVERY_KIND)
@given(data=st.data())
def test_the_pieces_are_the_text_of_the_whole_and_none_is_taken_back(kind: str, data: Any) -> None:
    tokenizer = Tokenizer(EVERY_KIND[kind])
    prompt, answer = data.draw(tokens_of(kind), label="prompt"), data.draw(tokens_of(kind), label="answer")
    prompt = prompt[: data.draw(st.integers(0, len(prompt)))]
    stream, text, at = TextStream(tokenizer, np.array(prompt, np.int32)), "", 0
    while at < len(answer):
        count = data.draw(st.integers(1, 5))
        text += stream.push(answer[at : at + count])
        at += count
        whole = tokenizer.decode(answer[:at], prompt=prompt)
        assert text in (whole, whole.removesuffix("\ufffd"))
    assert text + stream.finish() == tokenizer.decode(answer, prompt=prompt)
    assert stream.finish() == ""
    stream.restart()
    assert stream.push(answer) + stream.finish() == tokenizer.decode(answer, prompt=prompt)


def pieces(kind: str, prompt: Sequence[int], answer: Sequence[int]) -> list[str]:
    stream = TextStream(Tokenizer(EVERY_KIND[kind]), prompt)
    return [*(stream.push([token]) for token in answer), stream.finish()]


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_text_is_given_as_soon_as_no_byte_can_change_it(kind: str) -> None:
    first = FIRST_BYTE[kind]
    a, smile, wrong = EVERY_KIND[kind].token_to_id("a"), [first + byte for byte in "😀".encode()], first + 0xFF
    assert pieces(kind, [a], [*smile, a]) == ["", "", "", "😀", "a", ""]
    assert pieces(kind, [a], [wrong] * 3 + [a, a]) == ["", "\ufffd", "\ufffd", "\ufffda", "a", ""]
    # The half of a character that the prompt ends with is the answer's only where that makes it whole.
    assert pieces(kind, [a, *smile[:2]], [*smile[2:], a]) == ["", "😀", "a", ""]
    assert pieces(kind, [a, *smile[:2]], [smile[2], a]) == ["", "a", ""]
    assert pieces(kind, [a, *smile[:3]], []) == [""]


def test_a_word_keeps_its_space_behind_a_token_that_is_only_a_space() -> None:
    space, lo = (EVERY_KIND["sentencepiece"].token_to_id(name) for name in ("▁", "▁lo"))
    assert pieces("sentencepiece", [], [space, lo]) == ["", " lo", ""]
    assert pieces("sentencepiece", [space], [lo]) == [" lo", ""]


def test_a_byte_that_is_wrong_changes_no_text_before_it() -> None:
    tokenizer = Tokenizer(EVERY_KIND["sentencepiece"])
    before = [3 + ord(" "), EVERY_KIND["sentencepiece"].token_to_id("a")]
    assert tokenizer.decode([*before, 3 + 0xFF]) == tokenizer.decode(before) + "\ufffd"


OF_THE_LIBRARY = decoders.DecodeStream


class Counting(Tokenizer):
    """Counts the tokens that the library decodes."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__(backend)
        self.decoded = 0

    def text_of(self, token_ids: Sequence[int]) -> str:
        self.decoded += len(token_ids)
        return super().text_of(token_ids)


@pytest.mark.parametrize("kind", EVERY_KIND)
@given(data=st.data())
def test_a_token_costs_the_same_however_many_came_before(kind: str, data: Any) -> None:
    tokenizer = Counting(EVERY_KIND[kind])

    class Library:
        """The library's decoder, which decodes again all since it gave text last, and the tokens that gave that."""

        def __init__(self, ids: list[int], *, skip_special_tokens: bool) -> None:
            self.real = OF_THE_LIBRARY(ids, skip_special_tokens=skip_special_tokens)
            self.behind, self.gave_text = len(ids), True

        def step(self, backend: tokenizers.Tokenizer, token: int) -> str | None:
            assert self.gave_text
            tokenizer.decoded += 2 * self.behind + 2
            self.behind = 1
            piece = self.real.step(backend, token)
            self.gave_text = piece is not None
            return piece

    part = data.draw(tokens_of(kind).filter(bool))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(text_module.decoders, "DecodeStream", Library)
        stream = TextStream(tokenizer)
        most = 0
        for token in part * (1 + 600 // len(part)):
            before = tokenizer.decoded
            stream.push([token])
            most = max(most, tokenizer.decoded - before)
    assert most <= 7 * CONTEXT_TOKENS


def test_a_decoder_that_rewrites_what_was_given_is_refused() -> None:
    steps = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")])
    stream = TextStream(Tokenizer(words(steps, "a", "b")))
    assert stream.push([1]) == "a"
    with pytest.raises(CheckpointError, match="cannot decode the answer") as error:
        stream.push([2])
    assert not {"'a'", "'c'", "'ab'"} & set(str(error.value).split())  # no answer is for a log
    stream.restart()
    assert stream.push([1, 1]) == "aa"


def test_a_decoder_that_panics_is_an_error_of_ours_and_the_stream_can_begin_again() -> None:
    class Panic(BaseException):
        pass

    tokenizer = Tokenizer(EVERY_KIND["byte level"])
    stream = TextStream(tokenizer, [104])

    def panicking(*args: Any, **options: Any) -> str:
        raise Panic("index out of bounds")

    class Backend:
        decode = panicking

        def __getattr__(self, name: str) -> Any:
            return getattr(EVERY_KIND["byte level"], name)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenizer, "_backend", Backend())
        with pytest.raises(CheckpointError, match=r"cannot decode the answer: Panic$"):
            stream.push([105])
    stream.restart()
    assert stream.push([105]) + stream.push([106]) == "ij"
