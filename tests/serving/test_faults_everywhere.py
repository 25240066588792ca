"""An error at every line of the host's part of a step, one after the other: no answer is wrong, lost or waited for."""

import sys
from collections import Counter
from pathlib import Path

import pytest
from adjusting import answer_of
from test_generation import random_prompts, small_llm

import engine
from engine.serving.sampling_params import SamplingParams

ROOMS = str(Path(engine.__file__).parent)
# What a fault may leave undone or do twice is not the books': when held-back interrupts come, and log lines.
OUTSIDE = ("interrupts.py", "exporter.py", "gate.py", "build.py")
PATIENCE = 400  # steps; a run without a fault takes about 30


class Tracer:
    """Counts the lines that run in the rooms of the host, and raises at one of them."""

    def __init__(self, at=None):
        self.seen = Counter()
        self.at, self.nth = at or (None, 0)
        self.raised = False

    def __enter__(self):
        sys.settrace(self.call)

    def __exit__(self, *_):
        sys.settrace(None)

    def call(self, frame, event, _):
        name = frame.f_code.co_filename
        if frame.f_code.co_name == "forget":  # what a weak reference calls cannot raise
            return None
        return self.line if name.startswith(ROOMS) and not name.endswith(OUTSIDE) else None

    def line(self, frame, event, _):
        if event == "line":
            place = frame.f_code.co_filename, frame.f_lineno
            self.seen[place] += 1
            if place == self.at and self.seen[place] == self.nth:
                self.raised = True
                sys.settrace(None)
                raise MemoryError(f"injected at {place}")
        return self.line


SHARED = random_prompts([17], seed=90)[0]
PROMPTS = [SHARED, [*SHARED, 5, 6], *random_prompts([3, 30], seed=91)]
PARAMS = [
    SamplingParams(max_new_tokens=9, logprobs=2),
    SamplingParams(max_new_tokens=6, n=3, repetition_penalty=1.5, logit_bias={3: 1}),
    SamplingParams(max_new_tokens=12, priority=1, frequency_penalty=0.7),
    SamplingParams(max_new_tokens=5, timeout=1e6),
]
DOOMED = SamplingParams(max_new_tokens=40)


def run(llm, tracer):
    """The same traffic each time: two prompts that begin alike, several answers, an abort; returns the answers."""
    llm.reset_prefix_cache()
    finished, ids = {}, []

    def careful(call, *arguments):
        try:
            return call(*arguments)
        except Exception:
            assert tracer.raised
            return None

    with tracer:
        for prompt, params in zip(PROMPTS[:3], PARAMS[:3], strict=True):
            ids.append(careful(llm.add_request, prompt, params))
        for _ in range(3):
            finished |= careful(llm.step) or {}
        doomed = careful(llm.add_request, [7] * 9, DOOMED)
        ids.append(careful(llm.add_request, PROMPTS[3], PARAMS[3]))
        for _ in range(4):
            finished |= careful(llm.step) or {}
        if doomed is not None and tracer.raised and doomed in llm._groups.unfinished:
            llm.abort(doomed)
        elif doomed is not None:
            careful(llm.abort, doomed)
        steps = 0
        while set(ids) - {None} - finished.keys():
            steps += 1
            assert steps < PATIENCE, "requests do not get on"
            finished |= careful(llm.step) or {}
    if doomed is not None:
        llm.abort(doomed)
    return ids, finished


def check(llm, ids, finished, right):
    for request_id, expected in zip(ids, right, strict=True):
        if request_id is not None:  # else its add_request has raised
            answers = [finished[request_id], *finished[request_id].siblings]
            assert [answer.token_ids for answer in answers] == expected
            assert {answer.finish_reason for answer in answers} == {"length"}
            assert all(answer.logprobs is None or len(answer.logprobs) == len(answer.token_ids) for answer in answers)
    llm.check_integrity()
    llm.metrics()
    assert not llm.scheduler.has_work
    assert not llm._groups.unfinished
    assert [cache.held_tokens for cache in llm.caches] == [0]


def sweep(llm, right, occurrences, stride=1, offset=0):
    """Raises at each line that a run passes, at the wanted ones of its times; returns at how many places."""
    clean = Tracer()
    ids, finished = run(llm, clean)
    check(llm, ids, finished, right)
    places = sorted(clean.seen.items())
    trials = sorted({(place, nth) for place, times in places for nth in occurrences(times)})[offset::stride]
    wrong = {}
    for trial in trials:
        try:
            check(llm, *run(llm, Tracer(trial)), right)
        except Exception as error:
            wrong[trial] = error
            llm.scheduler.restart(llm._groups.members(), keeps_pages=False)
    assert not wrong, f"{len(wrong)} of {len(trials)} faults did harm"
    return len(trials)


OPTIONS = {
    "tight": {"max_total_tokens": 72, "context_length": 64},
    "host tier": {"max_total_tokens": 72, "context_length": 64, "host_tier_bytes": 1 << 18},
}


@pytest.fixture(scope="module")
def right(dense):
    answers = [answer_of(dense, prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    return [[answer] * params.n for answer, params in zip(answers, PARAMS, strict=True)]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_error_at_any_line_of_a_step_leaves_every_answer_right(llama, right, name):
    llm = small_llm(llama, **OPTIONS[name])
    compiles = llm.compiles_after_warmup
    assert sweep(llm, right, lambda times: {1 + times // 2}, stride=12) > 40
    assert llm.compiles_after_warmup == compiles


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_error_at_every_line_of_a_step_leaves_every_answer_right(llama, right, name, overlap):
    llm = small_llm(llama, **OPTIONS[name], overlap_steps=overlap)
    assert sweep(llm, right, lambda times: {1, 2, 1 + times // 2, times}) > 500
