"""A recorded engine: every decision of a run that is short of pages comes out again on fresh books."""

from __future__ import annotations

import gc

import pytest
from test_generation import random_prompts, small_llm

from engine.errors import ConfigError
from engine.serving.sampling_params import SamplingParams
from engine.trace.recorded_books import RecordedCacheManager
from engine.trace.replay import replay
from engine.trace.trace_file import read_trace
from engine.trace.trace_stats import count_trace


def busy_run(llm, seed=3):
    """Shared prompts, several answers, tenants, aborts, retractions, a reset and an answer after it."""
    prompts = [[7, 7, 7, 7, 7, 7, *prompt] for prompt in random_prompts(range(3, 11), seed)]
    params = [
        SamplingParams(
            max_new_tokens=12, ignore_eos=True, n=1 + index % 2, tenant_salt="hush" * (index % 3 == 0), seed=1
        )
        for index in range(len(prompts))
    ]
    ids = [llm.add_request(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    for step in range(400):
        if step == 6:
            llm.abort(ids[1])
        if not llm.scheduler.has_work:
            break
        llm.step()
    llm.generate(prompts[:2], SamplingParams(max_new_tokens=4))
    llm.reset_prefix_cache()
    llm.generate(prompts[:2], SamplingParams(max_new_tokens=4))


@pytest.mark.parametrize(
    "options",
    [
        {"max_total_tokens": 48, "context_length": 40},
        {"max_total_tokens": 64, "context_length": 40, "host_tier_bytes": 2**16},
        pytest.param(
            {"max_total_tokens": 64, "context_length": 40, "disable_radix_cache": True, "overlap_steps": False},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["tight", "host tier", "no prefix cache"],
)
def test_a_busy_engine_comes_out_again(llama, tmp_path, options):
    path = tmp_path / "trace"
    llm = small_llm(llama, record=str(path), **options)
    busy_run(llm)
    trace = read_trace(path)  # an idle engine has written all
    result = replay(trace.events)
    assert result.failure is None, result.failure.describe()
    assert result.is_exact
    stats = count_trace(trace.events)
    assert stats.calls["retract"]
    assert stats.calls["end"] >= 12
    assert stats.steps == result.steps > 20
    assert "hush" not in path.read_text()
    if "host_tier_bytes" in options:
        assert stats.saves
    assert str(stats.requests) in stats.describe()


def test_a_failed_step_leaves_a_trace_that_can_be_played(llama, tmp_path, monkeypatch):
    path = tmp_path / "trace"
    llm = small_llm(llama, record=str(path), max_total_tokens=64, context_length=40)
    step, failures = llm._runner.step, iter([False, False, True])

    def failing(*arguments):
        if next(failures, False):
            raise RuntimeError("the device is gone")
        return step(*arguments)

    monkeypatch.setattr(llm._runner, "step", failing)
    llm.generate(random_prompts((5, 9, 3), 4), SamplingParams(max_new_tokens=6, ignore_eos=True))
    trace = read_trace(path)
    assert "restart" in [event.what for event in trace.events]
    assert replay(trace.events).failure is None


def test_an_engine_that_is_not_asked_to_does_not_record(llama):
    llm = small_llm(llama)
    assert llm.scheduler.recorder is None
    assert not isinstance(llm.cache, RecordedCacheManager)


@pytest.mark.parametrize(("path", "message"), [(7, "path of a file"), ("/nowhere/at/all", "cannot record")])
def test_a_file_that_cannot_be_is_refused(llama, path, message):
    with pytest.raises(ConfigError, match=message):
        small_llm(llama, record=path)
    gc.collect()
