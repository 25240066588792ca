"""AsyncLLM: many coroutines, one engine's thread; cancelled tasks, slow readers, closing, faults."""

import asyncio
import random
import subprocess
import sys
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stream_cases import PARAMS, PROMPTS

from engine import LLM, AsyncLLM, ConfigError, EngineError, IntegrityError, QueueFull, RequestError, SamplingParams
from engine.serving import async_llm
from engine.serving.answering import Answering

OPTIONS = {"max_running_requests": 4, "chunked_prefill_size": 16, "context_length": 192, "page_size": 8}


@pytest.fixture(scope="module")
def llm():
    return LLM(**OPTIONS)


@pytest.fixture(scope="module")
def right(llm):
    return llm.generate(PROMPTS, PARAMS)


def told(output):
    """What depends on neither the cache nor the batch; log-probabilities are rounded differently in another batch."""
    answers = (output, *output.siblings)
    return [(a.token_ids, a.text, a.finish_reason, a.seed, a.logprobs and len(a.logprobs)) for a in answers]


async def collect(answering):
    deltas = {}
    async for gained in answering:
        for delta in gained:
            deltas.setdefault(delta.index, []).append(delta)
    return deltas


def check(deltas, output):
    for index, answer in enumerate((output, *output.siblings)):
        mine = deltas[index]
        assert [token for delta in mine for token in delta.token_ids] == answer.token_ids
        assert "".join(delta.text for delta in mine) == answer.text
        assert [delta.finish_reason for delta in mine] == [None] * (len(mine) - 1) + [answer.finish_reason]


def runs(llm, play, **options):
    """Plays with an AsyncLLM over ``llm``; whatever happened, it is idle, whole and without a page held afterwards."""

    async def main():
        async with AsyncLLM.over(llm, **options) as engine:
            result = await asyncio.wait_for(play(engine), 60)
        assert engine.unfinished == 0
        return result

    threads = threading.active_count()
    result = asyncio.run(main())
    assert threading.active_count() <= threads
    assert not llm.scheduler.has_work
    assert llm.cache.held_tokens == 0
    llm.check_integrity()
    return result


def test_answers_and_their_deltas_are_those_of_generate(llm, right):
    async def play(engine):
        answerings = [await engine.submit(p, each) for p, each in zip(PROMPTS, PARAMS, strict=True)]
        gained = await asyncio.gather(*map(collect, answerings))
        outputs = await asyncio.gather(*(engine.generate(p, each) for p, each in zip(PROMPTS, PARAMS, strict=True)))
        return answerings, gained, outputs

    answerings, gained, outputs = runs(llm, play)
    for answering, deltas, output, expected in zip(answerings, gained, outputs, right, strict=True):
        check(deltas, answering.output)
        assert told(answering.output) == told(output) == told(expected)
        assert answering.prompt_tokens == len(expected.prompt_token_ids)
        assert answering.cached_tokens == answering.output.cached_tokens


def test_a_stream_yields_delta_by_delta(llm, right):
    async def play(engine):
        return [delta async for delta in engine.stream(PROMPTS[1], PARAMS[1])]

    deltas = {}
    for delta in runs(llm, play):
        deltas.setdefault(delta.index, []).append(delta)
    check(deltas, right[1])


def test_a_text_is_encoded_elsewhere_and_a_prompt_is_refused_at_once(llm):
    async def play(engine):
        long = "Alice was beginning to get very tired. " * 100
        for prompt, params in ((long, None), ([], None), ([1], SamplingParams(stop_token_ids=(10**6,)))):
            with pytest.raises(RequestError):
                await engine.submit(prompt, params)
        with pytest.raises(RequestError):
            async for _ in engine.stream(""):
                pass
        assert engine.unfinished == 0

    runs(llm, play)


@pytest.mark.parametrize("waits", ["stream", "result", "generate"])
def test_cancelling_a_task_aborts_its_request_within_a_step(llm, waits):
    async def play(engine):
        answering = await engine.submit("Alice was", SamplingParams(max_new_tokens=150))

        async def stream():
            async for _ in engine.stream("Alice was", SamplingParams(max_new_tokens=150)):
                pass

        waiting = {
            "stream": stream,
            "result": answering.result,
            "generate": lambda: engine.generate("Alice was", SamplingParams(max_new_tokens=150)),
        }[waits]
        task = asyncio.create_task(waiting())
        while not (await engine.call(lambda llm: len(llm.scheduler.running))):
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if waits != "result":
            answering.abort()
            await answering.result()
        steps = await engine.call(lambda llm: llm.stats.steps)
        held = await engine.call(lambda llm: llm.cache.held_tokens)
        assert held == 0
        assert await engine.call(lambda llm: llm.stats.steps) <= steps + 1

    runs(llm, play)


def test_an_iteration_that_is_left_aborts_and_the_output_says_so(llm):
    async def play(engine):
        answering = await engine.submit("Alice was", SamplingParams(max_new_tokens=150))
        async for _ in answering:
            break
        output = await answering.result()
        assert output.finish_reason == "abort"
        assert 0 < len(output.token_ids) < 150
        assert await answering.result() is output
        answering.abort()

    runs(llm, play)


def test_a_slow_reader_holds_nobody_up_and_gets_everything_in_few_items(llm, right):
    async def play(engine):
        slow = await engine.submit(PROMPTS[3], PARAMS[3])
        fast = [await engine.submit(PROMPTS[0], PARAMS[0]) for _ in range(5)]
        await asyncio.gather(*map(collect, fast))
        while not slow.has_ended:
            await asyncio.sleep(0.001)
        items = [item async for item in slow]
        assert len(items) == 1
        check({0: list(items[0])}, slow.output)
        assert told(slow.output) == told(right[3])

    runs(llm, play)


@pytest.mark.parametrize(("seconds", "reports"), [(0.0, 40), (1000.0, 2)])
def test_steps_within_a_report_s_time_are_told_together_but_for_the_first_token_and_the_end(
    llm, right, monkeypatch, seconds, reports
):
    told_of, gain = [], Answering.gain
    monkeypatch.setattr(async_llm, "REPORT_SECONDS", seconds)
    monkeypatch.setattr(Answering, "gain", lambda self, *what: (told_of.append(what[0]), gain(self, *what)))

    async def play(engine):
        answering = await engine.submit(PROMPTS[3], PARAMS[3])
        check(await collect(answering), answering.output)
        assert told(answering.output) == told(right[3])

    runs(llm, play)
    assert [len(deltas[0].token_ids) for deltas in told_of][:1] == [1]
    assert len(told_of) == reports


def test_a_full_queue_refuses_and_says_when_to_come_back(llm):
    async def play(engine):
        params = SamplingParams(max_new_tokens=8)
        first = [await engine.submit([i + 1, 2, 3], params, streams=False) for i in range(6)]
        with pytest.raises(QueueFull, match="2 answers wait and 2 may") as refused:
            await engine.submit([9], params)
        assert refused.value.retry_after >= 1
        with pytest.raises(QueueFull):
            await engine.submit([9], SamplingParams(n=2))
        await asyncio.gather(*(each.result() for each in first))
        await engine.generate([9], params)
        for _ in range(3):
            with pytest.raises(RequestError):  # refused prompts leave their places
                await engine.submit([], SamplingParams(n=4))
        assert engine.unfinished == 0

    runs(llm, play, max_waiting=2)


@pytest.mark.parametrize("max_waiting", [-1, 1.5, "many"])
def test_a_wrong_bound_of_the_queue_is_refused(llm, max_waiting):
    with pytest.raises(ConfigError, match="max_waiting"):
        AsyncLLM.over(llm, max_waiting=max_waiting)


def test_a_call_runs_between_steps_and_its_errors_come_back(llm):
    async def play(engine):
        answering = await engine.submit("Alice was", SamplingParams(max_new_tokens=60))
        assert await engine.call(lambda _: threading.current_thread().name) == "engine"
        with pytest.raises(ZeroDivisionError):
            await engine.call(lambda _: 1 / 0)
        await engine.call(lambda llm: llm.reset_prefix_cache())
        await engine.call(lambda llm: llm.abort(answering.request_id))
        assert (await answering.result()).finish_reason == "abort"
        assert engine.metrics().waiting == 0

    runs(llm, play)


def test_closing_drains_or_aborts_and_refuses_what_comes_later(llm):
    async def play():
        outputs = []
        for options in ({"drain": True}, {"drain": False}, {"drain": True, "timeout": 0.0}):
            engine = AsyncLLM.over(llm)
            assert engine.is_healthy
            answering = await engine.submit("Alice was", SamplingParams(max_new_tokens=150))
            await engine.call(lambda _: None)
            await engine.close(**options)
            assert not engine.is_healthy
            outputs.append(await answering.result())
            for late in (engine.submit("A"), engine.generate("A"), engine.call(lambda _: None)):
                with pytest.raises(EngineError, match="closed"):
                    await late
            await engine.close()
        return [output.finish_reason for output in outputs]

    assert asyncio.run(play()) == ["length", "abort", "abort"]
    assert llm.cache.held_tokens == 0
    assert llm.generate(["A"])[0].token_ids  # and the LLM serves on


def test_a_step_that_fails_once_is_run_again(llm, right, monkeypatch):
    async def play(engine):
        advance, left = llm._stepper.advance, [3]

        def failing(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("the device is unwell")
            return advance(*args, **kwargs)

        monkeypatch.setattr(llm._stepper, "advance", failing)
        answering = await engine.submit(PROMPTS[3], PARAMS[3])
        check(await collect(answering), answering.output)
        assert told(answering.output) == told(right[3])

    runs(llm, play)


def test_a_request_that_keeps_failing_ends_with_an_error_and_others_go_on(llm, right, monkeypatch):
    async def play(engine):
        admit = llm.caches[0].admit

        def failing(scope, tokens, **options):
            if tokens[0] == 7:
                raise RuntimeError("this one is unwell")
            return admit(scope, tokens, **options)

        monkeypatch.setattr(llm.caches[0], "admit", failing)
        bad, good = await engine.submit([7, 7, 7]), await engine.submit(PROMPTS[0], PARAMS[0])
        outputs = await asyncio.gather(bad.result(), good.result())
        assert outputs[0].finish_reason == "error"
        assert "unwell" in outputs[0].error
        assert told(outputs[1]) == told(right[0])

    runs(llm, play)


def test_an_engine_that_has_failed_tells_everybody(llm, monkeypatch):
    async def play():
        engine = AsyncLLM.over(llm)
        answering = await engine.submit("Alice was", SamplingParams(max_new_tokens=150))
        await engine.call(lambda _: None)
        monkeypatch.setattr(llm, "step", lambda: (_ for _ in ()).throw(IntegrityError("a page is lost")))
        with pytest.raises(IntegrityError, match="a page is lost"):
            await answering.result()
        assert not engine.is_healthy
        for late in (engine.submit("A"), engine.call(lambda _: None)):
            with pytest.raises(EngineError, match="has failed: a page is lost"):
                await late
        assert engine.unfinished == 0
        await engine.close()
        monkeypatch.undo()
        llm.abort(answering.request_id)

    asyncio.run(play())


def test_requests_of_a_loop_that_was_closed_are_aborted(llm):
    engines = []

    async def leave():
        engines.append(AsyncLLM.over(llm))
        await engines[0].submit("Alice was", SamplingParams(max_new_tokens=150))

    async def look():
        while engines[0].unfinished:
            await asyncio.sleep(0.001)
        await engines[0].close()

    asyncio.run(leave())
    asyncio.run(asyncio.wait_for(look(), 30))
    assert llm.cache.held_tokens == 0


@pytest.mark.parametrize("kind", [SystemExit, StopIteration, KeyboardInterrupt])
def test_what_would_end_a_thread_reaches_who_has_called_and_the_engine_goes_on(llm, kind):
    def fails(_):
        raise kind("stop")

    async def play(engine):
        calling = engine.call(fails)
        error = None
        try:
            calling.send(None).add_done_callback(lambda done: told.set())  # as a task does, which would pass it on
            await asyncio.wait_for(told.wait(), 10)
            calling.send(None)
        except BaseException as raised:
            error = raised
        assert isinstance(error, RuntimeError if kind is StopIteration else kind)
        assert (await engine.generate("A", SamplingParams(max_new_tokens=2, ignore_eos=True))).finish_reason == "length"

    told = asyncio.Event()
    runs(llm, play)


def test_a_request_that_cannot_be_aborted_at_once_is_told_its_end(llm, monkeypatch):
    async def play(engine):
        end, faults = llm.scheduler.end, [MemoryError("full")]

        def failing(*args):
            if faults:
                raise faults.pop()
            return end(*args)

        params = SamplingParams(max_new_tokens=60, ignore_eos=True)
        aborted, other = await engine.submit("Alice was", params), await engine.submit("The Queen", params)
        await engine.call(lambda _: monkeypatch.setattr(llm.scheduler, "end", failing))
        aborted.abort()
        assert (await asyncio.wait_for(aborted.result(), 10)).finish_reason == "abort"
        assert not faults
        assert (await other.result()).finish_reason == "length"

    runs(llm, play)


def test_an_aborted_answer_whose_text_fails_costs_nobody_else_anything(llm, monkeypatch):
    async def play(engine):
        text_of = llm._reports._text_of
        params = SamplingParams(max_new_tokens=60, ignore_eos=True)
        aborted = await engine.submit("Alice was", params, streams=False)
        other = await engine.submit("The Queen", params)
        monkeypatch.setattr(llm._reports, "_text_of", lambda r: 1 / 0 if r is aborted.request else text_of(r))
        aborted.abort()
        output = await asyncio.wait_for(aborted.result(), 10)
        assert (output.finish_reason, output.text) == ("abort", "")
        assert "ZeroDivisionError" in output.error
        assert (await other.result()).finish_reason == "length"

    runs(llm, play)


def test_everybody_is_told_where_telling_one_fails(llm, monkeypatch):
    async def play():
        engine = AsyncLLM.over(llm)
        answerings = [
            await engine.submit("Alice was", SamplingParams(max_new_tokens=n, ignore_eos=True)) for n in (3, 4)
        ]
        await engine.call(lambda _: None)
        tell = engine._tell
        monkeypatch.setattr(
            engine, "_tell", lambda loop, gains: 1 / 0 if any(output for *_, output, _ in gains) else tell(loop, gains)
        )
        for answering in answerings:
            with pytest.raises(EngineError, match="ZeroDivisionError"):
                await asyncio.wait_for(answering.result(), 10)
        assert engine.unfinished == 0
        await engine.close()
        for answering in answerings:
            llm.abort(answering.request_id)

    asyncio.run(play())


def test_closing_that_is_cancelled_ends_the_thread_all_the_same(llm):
    async def play():
        engine = AsyncLLM.over(llm)
        answering = await engine.submit("Alice was", SamplingParams(max_new_tokens=150, ignore_eos=True))
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        closing.cancel()
        assert (await asyncio.wait_for(answering.result(), 10)).finish_reason == "abort"
        return engine._thread

    thread = asyncio.run(play())
    thread.join(10)
    assert not thread.is_alive()


def test_requests_that_could_never_have_a_place_or_are_no_request_are_refused(llm):
    async def play(engine):
        with pytest.raises(RequestError, match="lower n"):
            await engine.submit("A", SamplingParams(n=7))
        for params in ([SamplingParams(n=3)], {"n": 3}, 3):
            with pytest.raises(RequestError, match="give a SamplingParams"):
                await engine.submit("A", params)
        assert engine.unfinished == 0

    runs(llm, play, max_waiting=2)


def test_requests_without_a_reader_of_a_loop_that_was_closed_are_aborted(llm):
    loop = asyncio.new_event_loop()
    engine = AsyncLLM.over(llm)
    before = llm.stats.finished["abort"]
    params = SamplingParams(max_new_tokens=150, ignore_eos=True)
    loop.run_until_complete(engine.submit("Alice was", params, streams=False))
    loop.close()

    async def look():
        while engine.unfinished:
            await asyncio.sleep(0.001)
        await engine.close()

    asyncio.run(asyncio.wait_for(look(), 30))
    assert llm.stats.finished["abort"] == before + 1
    assert llm.cache.held_tokens == 0


BUSY = """
import asyncio, threading, time
from engine import AsyncLLM, SamplingParams
engine = AsyncLLM(max_running_requests=4, chunked_prefill_size=16, context_length=192, page_size=8)
async def serve():
    while True:
        await engine.generate("Alice", SamplingParams(max_new_tokens=150, ignore_eos=True))
async def main():
    await asyncio.gather(*(serve() for _ in range(6)))
def drive():
    try:
        asyncio.run(main())
    except Exception as error:
        print(error)
threading.Thread(target=drive, daemon=True).start()
while engine.unfinished < 6:
    time.sleep(0.01)
time.sleep(0.1)
"""


def test_the_process_ends_cleanly_while_the_engine_is_busy():
    ended = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "terminate" not in ended.stderr


DOING = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(1, 30), st.sampled_from(["read", "slow", "leave", "cancel", "abort", "wait"])
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(doing=DOING, seed=st.integers(0, 2**16))
def test_whatever_readers_do_answers_are_right_and_pages_come_back(llm, doing, seed):
    whole = whole_answers(llm)
    chance = random.Random(seed)

    async def one(engine, which, count, kind):
        params = SamplingParams(max_new_tokens=count, ignore_eos=True)
        if kind == "wait":
            return which, await engine.generate(PROMPTS[which], params)
        answering = await engine.submit(PROMPTS[which], params)
        if kind == "abort":
            asyncio.get_running_loop().call_later(chance.random() / 100, answering.abort)
        tokens = []
        async for deltas in answering:
            tokens += [token for delta in deltas for token in delta.token_ids]
            assert tokens == whole[which][: len(tokens)]
            if kind == "slow":
                await asyncio.sleep(chance.random() / 200)
            if kind == "leave":
                break
        return which, await answering.result()

    async def play(engine):
        tasks = [asyncio.create_task(one(engine, *each)) for each in doing]
        for task, (_, _, kind) in zip(tasks, doing, strict=True):
            if kind == "cancel":
                await asyncio.sleep(chance.random() / 100)
                task.cancel()
        for (_, count, kind), result in zip(doing, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            if isinstance(result, asyncio.CancelledError):
                assert kind == "cancel"
                continue
            which, output = result
            assert output.token_ids == whole[which][: len(output.token_ids)]
            if output.finish_reason == "length":
                assert len(output.token_ids) == count
            else:
                assert (kind, output.finish_reason) in (("leave", "abort"), ("abort", "abort"))

    runs(llm, play)


def whole_answers(llm, known={}):  # noqa: B006
    if not known:
        outputs = llm.generate(PROMPTS, SamplingParams(max_new_tokens=30, ignore_eos=True))
        known.update(enumerate(output.token_ids for output in outputs))
    return known
