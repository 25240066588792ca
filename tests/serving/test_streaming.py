"""What answers gain from step to step: every token and every character once, and in order."""

import gc
import sys
import threading
import weakref
from collections import defaultdict

import numpy as np
import pytest
from stream_cases import PARAMS, PROMPTS

from engine import LLM, AnswerDelta, RequestError, SamplingParams


@pytest.fixture(scope="module", params=[True, False], ids=["overlap", "no overlap"])
def llm(request):
    return LLM(
        max_running_requests=4, chunked_prefill_size=16, context_length=192, page_size=8, overlap_steps=request.param
    )


@pytest.fixture(scope="module")
def right(llm):
    return llm.generate(PROMPTS, PARAMS)


def answers_of(output):
    return (output, *output.siblings)


class Collected:
    """The deltas of one request, checked as they come."""

    def __init__(self):
        self.deltas = defaultdict(list)

    def add(self, deltas):
        assert len({delta.index for delta in deltas}) == len(deltas)
        for delta in deltas:
            assert isinstance(delta, AnswerDelta)
            before = self.deltas[delta.index]
            assert not before or before[-1].finish_reason is None
            assert delta.token_ids or delta.finish_reason
            before.append(delta)

    def check(self, output):
        assert sorted(self.deltas) == list(range(len(answers_of(output))))
        for index, answer in enumerate(answers_of(output)):
            deltas = self.deltas[index]
            assert [token for delta in deltas for token in delta.token_ids] == answer.token_ids
            assert "".join(delta.text for delta in deltas) == answer.text
            assert deltas[-1].finish_reason == answer.finish_reason
            if answer.logprobs is None:
                assert all(delta.logprobs is None for delta in deltas)
            else:
                assert [each for delta in deltas for each in delta.logprobs] == answer.logprobs


@pytest.mark.parametrize("every", [1, 3])
def test_the_new_tokens_of_every_step_are_together_the_answers(llm, right, every):
    ids = [llm.add_request(prompt, each) for prompt, each in zip(PROMPTS, PARAMS, strict=True)]
    collected, finished, steps = defaultdict(Collected), {}, 0
    while len(finished) < len(ids):
        out = llm.step()
        finished |= out
        steps += 1
        if steps % every == 0 or out:
            assert out.new is out.new
            for request_id, deltas in out.new.items():
                collected[request_id].add(deltas)
    for request_id, expected in zip(ids, right, strict=True):
        assert finished[request_id].token_ids == expected.token_ids
        collected[request_id].check(finished[request_id])
    assert llm.step().new == {}


def test_steps_keep_nothing_of_requests_that_have_ended(llm):
    kept = []
    for reads in (False, True):
        request_id = llm.add_request("Alice", SamplingParams(max_new_tokens=9))
        kept.append(weakref.ref(llm._groups.unfinished[request_id]))
        while request_id not in (out := llm.step()):
            if reads:
                assert set(out.new) <= {request_id}
    del out
    assert llm.step().new == {}
    gc.collect()
    assert [each() for each in kept] == [None, None]


def test_a_stream_yields_each_token_in_the_step_it_was_chosen_and_returns_the_output(llm, right):
    for prompt, each, expected in zip(PROMPTS, PARAMS, right, strict=True):
        collected, stream, items = Collected(), llm.stream(prompt, each), 0
        while True:
            try:
                collected.add((next(stream),))
            except StopIteration as end:
                output = end.value
                break
            items += 1
        collected.check(output)
        assert [answer.token_ids for answer in answers_of(output)] == [a.token_ids for a in answers_of(expected)]
        assert items >= each.max_new_tokens * each.n if each.n == 1 else True
    assert llm.cache.held_tokens == 0


def test_a_stream_that_is_closed_early_aborts_and_gives_its_pages_back(llm):
    stream = llm.stream("Alice was", SamplingParams(max_new_tokens=100))
    first = [next(stream) for _ in range(3)]
    assert all(delta.finish_reason is None for delta in first)
    assert llm.metrics().running == 1
    stream.close()
    assert llm.metrics().running == 0
    assert llm.cache.held_tokens == 0
    llm.check_integrity()


def test_two_streams_and_added_requests_share_steps(llm, right):
    added = llm.add_request(PROMPTS[0], PARAMS[0])
    streams = {1: llm.stream(PROMPTS[1], PARAMS[1]), 3: llm.stream(PROMPTS[3], PARAMS[3])}
    collected, outputs = defaultdict(Collected), {}
    while streams:
        for index, stream in list(streams.items()):
            try:
                collected[index].add((next(stream),))
            except StopIteration as end:
                outputs[index] = end.value
                del streams[index]
    for index, output in outputs.items():
        collected[index].check(output)
        assert output.token_ids == right[index].token_ids
    finished = {}
    while added not in finished:
        finished |= llm.step()
    assert finished[added].token_ids == right[0].token_ids


def test_a_prompt_that_can_never_be_served_is_refused_before_the_first_item(llm):
    with pytest.raises(RequestError):
        llm.stream([])
    with pytest.raises(RequestError):
        llm.stream(np.zeros(500, np.int32).tolist())


def test_an_aborted_request_gains_nothing_more(llm):
    request_id = llm.add_request("Alice was", SamplingParams(max_new_tokens=50))
    while not llm.step().new:
        pass
    llm.abort(request_id)
    assert llm.step().new == {}


@pytest.mark.parametrize("is_back", [True, False])
def test_a_text_that_cannot_be_had_as_it_comes_comes_at_the_end(llm, monkeypatch, is_back):
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    expected = llm.generate(["Alice was beginning"], params)[0]
    stream = llm.stream("Alice was beginning", params)
    deltas = [next(stream)]
    with monkeypatch.context() as patch:
        patch.setattr("engine.serving.deltas.AnswerText.read", lambda *_: 1 / 0)
        deltas += [next(stream)] if is_back else stream
    deltas += stream
    assert [token for delta in deltas for token in delta.token_ids] == expected.token_ids
    assert "".join(delta.text for delta in deltas) == expected.text
    assert {delta.text for delta in deltas[1:-1]} == {""}


def test_a_stream_that_the_steps_of_another_have_ended_tells_the_rest(llm):
    long, short = (llm.stream("Alice was", SamplingParams(max_new_tokens=n, ignore_eos=True)) for n in (30, 5))
    deltas = [next(short)]
    for _ in long:
        pass
    deltas += short
    assert sum(len(delta.token_ids) for delta in deltas) == 5
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]


def test_steps_that_are_read_late_tell_nothing_twice(llm):
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    request_id = llm.add_request("Alice", params)
    while not (first := llm.step()).new:
        pass
    unread = [llm.step()]
    while request_id not in unread[-1]:
        unread.append(llm.step())
    unread.append(llm.step())
    collected = Collected()
    for step in (first, *reversed(unread)):
        collected.add(step.new.get(request_id, ()))
    collected.check(unread[-2][request_id])


def test_streams_in_several_threads_are_whole(llm):
    params = SamplingParams(max_new_tokens=60, ignore_eos=True, stop=["zzqzz", "zzy"])
    expected, streamed = llm.generate(["Alice was"], params)[0], []

    def stream():
        for _ in range(3):
            streamed.append(list(llm.stream("Alice was", params)))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=stream) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for deltas in streamed:
        assert [token for delta in deltas for token in delta.token_ids] == expected.token_ids
        assert "".join(delta.text for delta in deltas) == expected.text
    assert len(streamed) == 12
