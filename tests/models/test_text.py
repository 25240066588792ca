from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import CheckpointError, RequestError
from engine.models.default_model import BOS_TOKEN_ID, DEFAULT_MODEL_DIR, EOS_TOKEN_ID, byte_tokenizer, default_config
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


SENTENCEPIECE_BOS, SENTENCEPIECE_EOS = 1, 2


def sentencepiece_tokenizer(*, metaspace: bool = False, with_bos: bool = False) -> tokenizers.Tokenizer:
    """As the checkpoints of Llama 2 and Mistral: spaces are letters, and unknown characters are byte tokens."""
    words = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdelmotw.,<s>/|")
    vocabulary = {word: token for token, word in enumerate(dict.fromkeys((*words, "▁a", "lo", "▁lo", "me")))}
    merges = [("▁", "a"), ("l", "o"), ("▁", "lo"), ("m", "e")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    special = [tokenizers.AddedToken(name, special=True, normalized=False) for name in words[:3]]
    tokenizer.add_special_tokens(special)
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SENTENCEPIECE_BOS)]
        )
    return tokenizer


def loaded(directory: Path, backend: tokenizers.Tokenizer, *, special: bool = True, **config: Any) -> Tokenizer:
    backend.save(str(directory / "tokenizer.json"))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(directory, parse_special_tokens=special)
    assert tokenizer is not None
    return tokenizer


KINDS = {
    "byte level": byte_tokenizer(),
    "sentencepiece": sentencepiece_tokenizer(),
    "sentencepiece with bos": sentencepiece_tokenizer(with_bos=True),
    "metaspace": sentencepiece_tokenizer(metaspace=True),
}


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.sampled_from("ab lo me.é€😀")).map("a".__add__), data=st.data())
def test_an_answer_is_the_text_that_follows_its_prompt_wherever_the_cut(kind: str, text: str, data: Any) -> None:
    tokenizer = Tokenizer(KINDS[kind])
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    prompt, answer = ids[:cut], ids[cut:]
    spoken, got = tokenizer.decode(prompt), tokenizer.decode(answer, prompt=np.array(prompt, np.int32))
    # Of a character that is split the whole belongs to the answer.
    assert (spoken.rstrip("\ufffd") if answer else spoken) + got == text


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
def test_the_first_space_of_an_answer_is_kept_behind_a_prompt_and_goes_where_the_text_begins(kind: str) -> None:
    tokenizer = Tokenizer(KINDS[kind])
    prompt, answer = tokenizer.encode("lo"), tokenizer.encode("a lo")
    assert tokenizer.decode(answer, prompt=prompt) == " a lo"
    assert tokenizer.decode(answer, prompt=[SENTENCEPIECE_BOS]) == "a lo"
    assert tokenizer.decode(answer) == "a lo"


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_a_character_split_between_prompt_and_answer_is_the_answers(kind: str) -> None:
    tokenizer = Tokenizer(KINDS[kind])
    ids = tokenizer.encode("é😀")
    for cut in (1, 2, 3):
        assert tokenizer.decode(ids[-cut:], prompt=ids[:-cut]) == "😀"


def test_only_the_bytes_that_are_wrong_are_replaced() -> None:
    tokenizer = Tokenizer(KINDS["sentencepiece"])
    backend = KINDS["sentencepiece"]
    tokens = {byte: backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    smile, lo = [tokens[byte] for byte in "😀".encode()], [backend.token_to_id("▁lo")]
    assert tokenizer.decode([*smile, tokens[0xFF], *smile, *lo, *smile[:2]], prompt=lo) == "😀\ufffd😀 lo\ufffd"
    # A special token between two halves has no bytes of its own.
    assert tokenizer.decode([*smile[:2], SENTENCEPIECE_EOS, *smile[2:], tokens[0xFF]]) == "😀\ufffd"


@given(st.lists(st.integers(3, 258)), st.lists(st.integers(3, 258), min_size=4))
def test_any_bytes_behind_any_bytes_decode_as_python_decodes_them(before: list[int], after: list[int]) -> None:
    tokenizer = Tokenizer(KINDS["sentencepiece"])
    prompt, answer = b"a" + bytes(t - 3 for t in before), bytes(t - 3 for t in after)
    spoken, whole = (part.decode(errors="replace") for part in (prompt, prompt + answer))
    while not whole.startswith(spoken):
        spoken = spoken[:-1]
    got = tokenizer.decode(after, prompt=[KINDS["sentencepiece"].token_to_id("a"), *before])
    assert got == whole[len(spoken) :]


def test_a_long_prompt_is_not_decoded_again_for_its_answer() -> None:
    class Prompt(list[int]):
        read = 0

        def __getitem__(self, index: Any) -> Any:
            Prompt.read += 1
            return super().__getitem__(index)

    assert TOKENIZER.decode([104, 105], prompt=Prompt([97] * 100_000)) == "hi"
    assert Prompt.read < 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_has_the_tokens_that_the_library_gives_it(kind: str) -> None:
    text = " lo, hé 😀\n" * 1000
    assert Tokenizer(KINDS[kind]).encode(text) == KINDS[kind].encode(text).ids


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    encoding = threading.Thread(target=TOKENIZER.encode, args=("a" * 2_000_000,))
    encoding.start()
    turns = 0
    while encoding.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path: Path) -> None:
    backend = byte_tokenizer()
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=32, pad_id=0)
    assert loaded(tmp_path, backend).encode("longer than four") == [BOS_TOKEN_ID, *b"longer than four"]


@pytest.mark.parametrize("named", ["<s>", {"__type": "AddedToken", "content": "<s>", "special": True}])
@pytest.mark.parametrize(
    ("with_bos", "add_bos", "begins"),
    [(False, True, 1), (True, True, 1), (True, False, 0), (True, None, 1), (False, None, 0)],
)
def test_add_bos_token_counts_and_no_bos_is_doubled(
    tmp_path: Path, named: Any, with_bos: bool, add_bos: bool | None, begins: int
) -> None:
    config = {"bos_token": named} | ({} if add_bos is None else {"add_bos_token": add_bos})
    tokenizer = loaded(tmp_path, sentencepiece_tokenizer(with_bos=with_bos), **config)
    assert tokenizer.encode("a").count(SENTENCEPIECE_BOS) == begins
    # A chat template writes its own, whatever the file adds.
    for text in ("<s>a", "<s> lo <s>a"):
        ids = tokenizer.encode(text)
        assert ids[0] == SENTENCEPIECE_BOS
        assert ids.count(SENTENCEPIECE_BOS) == text.count("<s>")


def test_add_eos_token_counts_once(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, sentencepiece_tokenizer(with_bos=True), eos_token="</s>", add_eos_token=True)
    for text in ("lo", "lo</s>"):
        ids = tokenizer.encode(text)
        assert (ids[0], ids[-1]) == (SENTENCEPIECE_BOS, SENTENCEPIECE_EOS)
        assert ids.count(SENTENCEPIECE_EOS) == 1
    assert tokenizer.eos_token_ids == {SENTENCEPIECE_EOS}


def test_a_token_that_the_vocabulary_lacks_ends_nothing(tmp_path: Path) -> None:
    assert loaded(tmp_path, byte_tokenizer(), eos_token="<|im_end|>").eos_token_ids == frozenset()


def test_the_name_of_a_special_token_can_be_fed_as_text(tmp_path: Path) -> None:
    text = "<s>a</s>"
    parsed = loaded(tmp_path, sentencepiece_tokenizer(with_bos=True), special=True)
    plain = loaded(tmp_path, sentencepiece_tokenizer(with_bos=True), special=False)
    assert {SENTENCEPIECE_BOS, SENTENCEPIECE_EOS} <= set(parsed.encode(text))
    ids = plain.encode(text)
    assert ids[0] == SENTENCEPIECE_BOS
    assert not {SENTENCEPIECE_BOS, SENTENCEPIECE_EOS} & set(ids[1:])
    assert plain.decode(ids) == text


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"add_bos_token": "yes"}, "add_bos_token='yes'"),
        ({"add_eos_token": 1}, "add_eos_token=1"),
        ({"eos_token": 2}, "eos_token=2"),
        ({"bos_token": {"text": "<s>"}}, "bos_token="),
        ([1], "tokenizer_config.json"),
    ],
)
def test_a_wrong_tokenizer_config_is_refused_by_name(tmp_path: Path, content: Any, named: str) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=named):
        load_tokenizer(tmp_path)


def test_a_panic_of_the_library_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_tokenizer().save(str(path))
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    piece = {"SpecialToken": {"id": "<none>", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [piece], "pair": [], "special_tokens": {}}
    path.write_text(json.dumps(content | {"post_processor": template}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    with pytest.raises(RequestError, match="cannot encode"):
        tokenizer.encode("a")


def test_a_decoder_that_panics_is_an_error_of_ours() -> None:
    class Panic(BaseException):
        pass

    class Backend:
        def __getattr__(self, name: str) -> Any:
            return getattr(KINDS["byte level"], name)

        def decode(self, *args: Any, **options: Any) -> str:
            raise Panic("index out of bounds")

    with pytest.raises(CheckpointError, match=r"cannot decode the answer: Panic$"):
        Tokenizer(Backend()).decode([104])  # type: ignore[arg-type]
