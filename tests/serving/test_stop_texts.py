"""Texts that end an answer, and the text of an answer while it grows."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_support import VOCAB, make_llama
from test_faults_everywhere import Tracer
from test_generation import random_prompts, small_llm
from tokenizers import decoders, models

from engine.models.checkpoint import save_model
from engine.models.text_stream import TextStream
from engine.serving.answer_text import AnswerText
from engine.serving.request import Request
from engine.serving.sampling_params import SamplingParams

LONGEST = 24


class Boom(Exception):
    """What an injected fault raises."""


class Pieces:
    """A stream whose token ``i`` makes the text ``pieces[i]`` certain; ``rest`` becomes so at the end."""

    def __init__(self, pieces, rest):
        self.pieces, self.rest = pieces, rest

    def restart(self):
        pass

    def push(self, token_ids):
        return "".join(self.pieces[token] for token in token_ids)

    def finish(self):
        return self.rest


def first_stop(growing, stop, min_tokens):
    """Of a text after each token: the number of tokens that complete a stop text, and the text before it; or None."""
    for count, (before, now) in enumerate(itertools.pairwise(("", *growing)), 1):
        starts = [now.find(text, max(0, len(before) - len(text) + 1)) for text in stop]
        if count > min_tokens and any(start >= 0 for start in starts):
            return count, now[: min(start for start in starts if start >= 0)]
    return None


FEW_LETTERS = st.text(st.sampled_from("ab"), max_size=4)


@settings(max_examples=500)
@given(
    pieces=st.lists(FEW_LETTERS, max_size=12),
    rest=FEW_LETTERS,
    stop=st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=6), max_size=4),
    min_tokens=st.integers(0, 5),
    data=st.data(),
)
def test_the_text_ends_before_the_first_stop_text_wherever_it_is_cut(pieces, rest, stop, min_tokens, data):
    growing = list(itertools.accumulate(pieces))
    # What is only certain at the end belongs to the tokens that came last.
    at_end = [*growing, "".join(pieces) + rest] if len(pieces) > min_tokens else growing
    found = first_stop(at_end, stop, min_tokens)
    text, taken, at = AnswerText(Pieces(pieces, rest), stop, min_tokens), "", 0
    while at < len(pieces):
        at = min(len(pieces), at + data.draw(st.integers(1, 3)))
        text.read(range(at))
        assert text.has_stopped == (found is not None and found[0] <= at)
        taken += text.take()
        if not text.has_stopped:
            begun = [known for each in stop for known in range(1, len(each)) if growing[at - 1].endswith(each[:known])]
            assert taken == growing[at - 1][: len(growing[at - 1]) - max(begun, default=0)]
    text.finish()
    assert taken + text.take() == text.text == (found[1] if found else "".join(pieces) + rest)
    assert text.has_stopped == (found is not None)


def test_a_text_that_a_fault_has_broken_is_made_of_all_tokens_again_and_given_once():
    stream = Pieces(["ab", "cd", "ef", "gx", "y"], "")
    text = AnswerText(stream, ["gxy"])
    text.read([0, 1])
    assert text.take() == "abcd"
    stream.pieces, whole = ["ab"], stream.pieces
    with pytest.raises(IndexError):
        text.read([0, 1, 2])
    stream.pieces = whole
    text.read([0, 1, 2, 3])
    assert (text.take(), text.num_tokens) == ("ef", 4)
    text.read([0, 1, 2, 3, 4])
    assert (text.take(), text.text, text.has_stopped) == ("", "abcdef", True)


def backend():
    """As many tokens as the model has: letters, words, parts of characters, what is none, one special token."""
    parts = ("ðŁ", "ĺ", "Ģ", "ðŁĺĢ", "Ã", "©", "Ã©", "ÿ", "âĤ", "¬", "Ġ", ".", "Ċ")
    words = [f"{space}{first}{second}" for first in "abcdefg" for second in ("", *"hijkl") for space in ("", "Ġ")]
    names = [*parts, *words][: VOCAB - 1]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate((*names, "[S]"))}, "[S]"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["[S]"])
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    save_model(make_llama(), directory)
    backend().save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module", params=[True, False], ids=["overlapped", "in turn"])
def llm(checkpoint, request):
    return small_llm(checkpoint, overlap_steps=request.param)


@pytest.fixture(scope="module")
def tight(checkpoint):
    return small_llm(checkpoint, max_total_tokens=48, context_length=60)


def certain_texts(llm, output):
    """What is certain of an answer's text after each of its tokens."""
    ids, prompt = output.token_ids, output.prompt_token_ids
    texts = [llm.tokenizer.decode(ids[:count], prompt=prompt) for count in range(1, len(ids) + 1)]
    return [text.removesuffix("\ufffd") for text in texts[:-1]] + texts[-1:]


def check_stopped(llm, full, got, params):
    """Compares an answer with what becomes of the one without stop texts."""
    for whole, answer in zip((full, *full.siblings), (got, *got.siblings), strict=True):
        texts = certain_texts(llm, whole)
        found = first_stop(texts, params.stop, params.min_tokens)
        count, text = found or (len(whole.token_ids), texts[-1])
        assert (answer.token_ids, answer.text) == (whole.token_ids[:count], text)
        assert answer.finish_reason == ("stop" if found else "length")


def draw_stops(draw, texts):
    """Some parts of the texts, and some text that hardly is one."""
    stops = draw(st.lists(st.text(st.sampled_from("ab h."), min_size=1, max_size=3), max_size=1))
    for text in draw(st.lists(st.sampled_from([text for text in texts if text] or ["a"]), min_size=1, max_size=3)):
        start = draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + draw(st.integers(1, 12))])
    return tuple(stops)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_answers_end_at_the_token_that_completes_a_stop_text_and_before_it(llm, data):
    draw = data.draw
    prompts = random_prompts(draw(st.lists(st.integers(1, 40), min_size=1, max_size=5)), draw(st.integers(0, 999)))
    plain = [
        SamplingParams(
            max_new_tokens=draw(st.integers(1, LONGEST)), temperature=1.0, seed=seed, n=draw(st.sampled_from((1, 1, 3)))
        )
        for seed, _ in enumerate(prompts)
    ]
    wholes = llm.generate(prompts, plain)
    params = []
    for param, whole in zip(plain, wholes, strict=True):
        if draw(st.integers(0, 3)):  # the others have neighbours with stop texts
            stop = draw_stops(draw, [answer.text for answer in (whole, *whole.siblings)])
            least = min(draw(st.sampled_from((0, 0, 3, 10))), param.max_new_tokens)
            param = dataclasses.replace(param, stop=stop, min_tokens=least)
        params.append(param)
    for whole, got, param in zip(wholes, llm.generate(prompts, params), params, strict=True):
        check_stopped(llm, whole, got, param)
    llm.check_integrity()
    assert llm.cache.held_tokens == 0


def test_a_stop_text_ends_requests_that_are_retracted(llm, tight):
    prompts = random_prompts([10, 12, 9, 11, 8], seed=41)
    plain = [SamplingParams(max_new_tokens=20, temperature=1.0, seed=seed) for seed in range(5)]
    wholes = llm.generate(prompts, plain)
    params = [dataclasses.replace(param, stop=whole.text[-4:-1]) for param, whole in zip(plain, wholes, strict=True)]
    before = tight.scheduler.retractions
    outputs = tight.generate(prompts, params)
    assert tight.scheduler.retractions > before
    assert "stop" in {output.finish_reason for output in outputs}
    for whole, got, param in zip(wholes, outputs, params, strict=True):
        check_stopped(llm, whole, got, param)
    tight.check_integrity()


def test_what_a_stopped_answer_leaves_cached_is_right(llm):
    llm.reset_prefix_cache()
    prompt, greedy = random_prompts([21], seed=61)[0], SamplingParams(max_new_tokens=LONGEST)
    whole = llm.generate([prompt], greedy, return_logits=True)[0]
    llm.reset_prefix_cache()
    stopped = llm.generate([prompt], dataclasses.replace(greedy, stop=whole.text[12:16]))[0]
    count = len(stopped.token_ids)
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", whole.token_ids[:count])
    rest = dataclasses.replace(greedy, max_new_tokens=LONGEST - count)
    again = llm.generate([prompt + stopped.token_ids], rest)[0]
    assert again.token_ids == whole.token_ids[count:]
    assert again.cached_tokens == (21 + count - 1) // 4 * 4


def test_an_answer_that_ends_by_its_length_keeps_the_beginning_of_a_stop_text(llm):
    prompt = random_prompts([7], seed=62)[0]
    whole = llm.generate([prompt], SamplingParams(max_new_tokens=9))[0]
    assert whole.finish_reason == "length"
    got = llm.generate([prompt], SamplingParams(max_new_tokens=9, stop=whole.text + "never"))[0]
    assert (got.text, got.token_ids, got.finish_reason) == (whole.text, whole.token_ids, "length")


def test_a_stop_token_and_a_stop_text_end_whichever_comes_first(llm):
    prompt = random_prompts([9], seed=63)[0]
    whole = llm.generate([prompt], SamplingParams(max_new_tokens=LONGEST))[0]
    texts = certain_texts(llm, whole)
    at = next(i for i in range(4, LONGEST) if whole.token_ids[i] not in whole.token_ids[:i] and len(texts[i]) > 8)
    by_token = SamplingParams(max_new_tokens=LONGEST, stop_token_ids=(whole.token_ids[at],), stop=texts[-1] + "!")
    got = llm.generate([prompt], by_token)[0]
    assert (got.token_ids, got.finish_reason) == (whole.token_ids[: at + 1], "stop")
    assert got.text == llm.tokenizer.decode(got.token_ids, prompt=prompt)
    sooner = dataclasses.replace(by_token, stop=texts[2])
    check_stopped(llm, whole, llm.generate([prompt], sooner)[0], sooner)


def test_requests_without_stop_texts_are_asked_for_their_end_once(llm, monkeypatch):
    asked = []
    original = Request.note_end
    monkeypatch.setattr(Request, "note_end", lambda request: asked.append(request) or original(request))
    llm.generate(random_prompts([5, 6, 7], seed=64), SamplingParams(max_new_tokens=12))
    assert len(asked) == 3


def test_a_stop_text_ends_a_request_of_step_beside_others(llm):
    first, second = random_prompts([6, 17], seed=65)
    plain = SamplingParams(max_new_tokens=LONGEST)
    wholes = llm.generate([first, second], plain)
    stopping = dataclasses.replace(plain, stop=(wholes[0].text[8:11],))
    ids, finished = [llm.add_request(first, stopping), llm.add_request(second, plain)], {}
    while len(finished) < 2:
        finished |= llm.step()
    check_stopped(llm, wholes[0], finished[ids[0]], stopping)
    assert finished[ids[1]].text == wholes[1].text


@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_tokenizer_that_fails_once_costs_no_answer(llm, monkeypatch, at):
    prompts = random_prompts([9, 14, 5], seed=66)
    plain = SamplingParams(max_new_tokens=15, temperature=1.0, seed=5, logprobs=1)
    wholes = llm.generate(prompts, plain)
    params = [dataclasses.replace(plain, stop=whole.text[9:12]) for whole in wholes[:2]] + [plain]
    original, calls = TextStream.push, itertools.count(1)

    def failing(stream, tokens):
        if next(calls) == at:
            raise Boom
        return original(stream, tokens)

    monkeypatch.setattr(TextStream, "push", failing)
    ids, finished, failures = [llm.add_request(p, q) for p, q in zip(prompts, params, strict=True)], {}, 0
    while len(finished) < 3:
        try:
            finished |= llm.step()
        except Boom:
            failures += 1
    assert failures == 1
    for whole, request_id, param in zip(wholes, ids, params, strict=True):
        check_stopped(llm, whole, finished[request_id], param)
        assert len(finished[request_id].logprobs) == len(finished[request_id].token_ids)
    llm.check_integrity()
    assert llm.cache.held_tokens == 0


@pytest.mark.parametrize("after", [0, 4])
def test_a_tokenizer_that_always_fails_for_a_request_ends_that_one_alone(llm, monkeypatch, after):
    prompts = random_prompts([9, 14, 5], seed=67)
    plain = SamplingParams(max_new_tokens=12, stop=("never in it",))
    wholes = llm.generate(prompts, plain)
    doomed, original = wholes[1].token_ids[after], TextStream.push

    def failing(stream, tokens):
        if stream._context == prompts[1][-len(stream._context) :] and doomed in tokens:
            raise Boom("no such text")
        return original(stream, tokens)

    monkeypatch.setattr(TextStream, "push", failing)
    outputs = llm.generate(prompts, plain)
    assert (outputs[1].finish_reason, outputs[1].error) == ("error", "Boom: no such text")
    assert outputs[1].token_ids == wholes[1].token_ids[: wholes[1].token_ids.index(doomed)]
    assert [outputs[i].text for i in (0, 2)] == [wholes[i].text for i in (0, 2)]
    llm.check_integrity()
    assert llm.cache.held_tokens == 0


FILES = ("answer_text.py", "text_stream.py", "text.py", "request.py", "reports.py", "replica.py")


def test_a_fault_at_any_line_leaves_answers_with_stop_texts_right(llm):
    prompts = random_prompts([9, 14], seed=68)
    plain = SamplingParams(max_new_tokens=8, temperature=1.0, seed=3)
    wholes = llm.generate(prompts, [dataclasses.replace(plain, n=2), plain])
    params = [
        dataclasses.replace(plain, n=2, stop=wholes[0].siblings[0].text[3:6]),
        dataclasses.replace(plain, stop=wholes[1].text[4:6]),
    ]

    def run(tracer):
        finished, ids = {}, [llm.add_request(*each) for each in zip(prompts, params, strict=True)]
        with tracer:
            for _ in range(100):
                try:
                    finished |= llm.step()
                except MemoryError:
                    assert tracer.raised
                if len(finished) == len(ids):
                    break
        return [finished[request_id] for request_id in ids]

    clean = Tracer()
    run(clean)
    places = [place for place in clean.seen if Path(place[0]).name in FILES]
    assert len({Path(name).name for name, _ in places}) == len(FILES)
    for place in places:
        for whole, got, param in zip(wholes, run(Tracer((place, 1 + clean.seen[place] // 2))), params, strict=True):
            check_stopped(llm, whole, got, param)
        llm.check_integrity()
        assert llm.cache.held_tokens == 0
