"""Ctrl-C at the worst moments: the engine goes on as if the call that it ended had not been made."""

import contextlib
import signal
import threading

import pytest
from test_generation import random_prompts, small_llm

from engine.serving.interrupts import HeldInterrupts
from engine.serving.sampling_params import SamplingParams

PARAMS = SamplingParams(max_new_tokens=8)


@pytest.fixture(scope="module")
def llm(llama):
    return small_llm(llama)


@pytest.fixture(autouse=True)
def handler_stays():
    # Python's own, for a run in the background may have been started with Ctrl-C ignored.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, outside) is signal.default_int_handler


def interrupted(call):
    """A call that does its work, and once is interrupted before it returns the result."""
    calls = []

    def wrapper(*arguments, **named):
        result = call(*arguments, **named)
        calls.append(result)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return result

    return wrapper


def interrupt(llm, where, monkeypatch):
    if where == "steps":
        steps = {shape: interrupted(step) for shape, step in llm._runner._steps.items()}
        monkeypatch.setattr(llm._runner, "_steps", steps)
    else:
        (replica,), pages = llm.scheduler.replicas, llm.cache.allocator.pages
        owners = {"take_singles": pages, "_still_run": replica, "release": replica}
        owner = {**owners, "fill": llm._stepper._batcher}.get(where, llm.scheduler)
        monkeypatch.setattr(owner, where, interrupted(getattr(owner, where)))


PLACES = ["steps", "take_singles", "fill", "_still_run", "commit", "release", "add"]


@pytest.mark.parametrize("where", PLACES)
def test_after_generate_was_interrupted_everything_works(llm, dense_greedy, monkeypatch, where):
    prompts = random_prompts([9, 40, 14], seed=71)
    llm.cache.reset_prefix_cache()
    with monkeypatch.context() as patched:
        interrupt(llm, where, patched)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, PARAMS)
    llm.cache.check_integrity()
    assert llm.cache.held_tokens == 0
    assert [o.token_ids for o in llm.generate(prompts, PARAMS)] == [dense_greedy(p, 8) for p in prompts]


@pytest.mark.parametrize("where", PLACES[:-1])
def test_whose_steps_were_interrupted_lose_no_token_and_no_answer(llm, dense_greedy, monkeypatch, where):
    prompts = random_prompts([9, 40, 14], seed=72)
    ids = [llm.add_request(prompt, PARAMS) for prompt in prompts]
    finished, interrupts = {}, 0
    while llm.scheduler.has_work or not interrupts:
        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            interrupt(llm, where, patched)
            interrupts += 1
            finished |= llm.step()
            interrupts -= 1
        llm.cache.check_integrity()
        finished |= llm.step()
    finished |= llm.step()
    assert interrupts
    assert [finished[i].token_ids for i in ids] == [dense_greedy(p, 8) for p in prompts]


def press(held, times, done):
    with held:
        with held:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        done.append("what was under way")


@pytest.mark.parametrize("times", [1, 2])
def test_the_first_waits_and_a_second_does_not(times):
    done = []
    with pytest.raises(KeyboardInterrupt):
        press(HeldInterrupts(), times, done)
    assert len(done) == (1 if times == 1 else 0)


def test_ignored_interrupts_stay_ignored():
    held, before = HeldInterrupts(), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_hold_nothing():
    held, seen = HeldInterrupts(), []

    def enter():
        with held:
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
