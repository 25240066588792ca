"""Log-probabilities as JSON, also of tokens that are no text."""

import json
import math

from engine.models.default_model import DEFAULT_MODEL_DIR
from engine.models.text import load_tokenizer
from engine.server.logprob_json import LEAST, ChatLogprobs, CompletionLogprobs, TokenNames
from engine.serving.request import TokenLogprobs

NAMES = TokenNames(load_tokenizer(DEFAULT_MODEL_DIR))
TEXT = "aé猫!"
TOKENS = [*TEXT.encode(), 257, *b"z"]  # the end of text in between
LOGPROBS = [TokenLogprobs(-0.5, ((token, -0.5), (0, -math.inf))) for token in TOKENS]


def test_a_part_of_a_character_is_named_by_its_bytes():
    content = ChatLogprobs(NAMES).write(0, TOKENS, LOGPROBS)["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]) == TEXT.encode() + b"<|end_of_text|>z"
    assert [entry["token"] for entry in content][:3] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert content[-2]["token"] == "<|end_of_text|>"


def test_what_is_impossible_is_a_number_that_json_can_say():
    content = ChatLogprobs(NAMES).write(0, TOKENS, LOGPROBS)["content"]
    assert content[0]["top_logprobs"][1]["logprob"] == LEAST
    written = CompletionLogprobs(NAMES).write(0, TOKENS, LOGPROBS)
    assert written["top_logprobs"][0] == {"a": -0.5, "\x00": LEAST}
    json.dumps([content, written], allow_nan=False)


def test_offsets_are_where_each_token_begins_however_they_come():
    whole = CompletionLogprobs(NAMES).write(0, TOKENS, LOGPROBS)["text_offset"]
    # A character is there with its last byte; a special token is no part of the text.
    assert whole == [0, 1, 1, 2, 2, 2, 3, 4, 4]
    pieces = CompletionLogprobs(NAMES)
    offsets = []
    for token, logprob in zip(TOKENS, LOGPROBS, strict=True):
        offsets += pieces.write(0, [token], [logprob])["text_offset"]
        pieces.write(1, [token], [logprob])  # another answer, which counts for itself
    assert offsets == whole


def test_tokens_of_a_model_without_texts_are_named_by_their_ids():
    names = TokenNames(None)
    assert names.of(7) == ("token_id:7", b"")
    assert CompletionLogprobs(names).write(0, [7, 8], LOGPROBS[:2])["text_offset"] == [0, 0]
