"""The engine of one's own in docs/examples answers as the product's engine and as the dense model do."""

import importlib.util
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from engine import LLM, RequestTooLarge, SamplingParams, ShapeError
from engine.models import DEFAULT_MODEL_DIR, dense_logits, load_model

PAGE, NEW = 16, 40
STORY = list(b"There was a table set out under a tree in front of the house, and the March Hare ")
PROMPTS = [
    STORY + list(b"and the Hatter were having tea at it"),
    list(b"A"),
    STORY + list(b"was not there"),
    list(b"The Queen turned crimson with fury, and, after glaring at her for a moment like a wild beast,"),
    list(b"Alice was beginning to"),
    STORY + list(b"and the Hatter were late"),
]


EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "own_engine.py"


def load_example():
    spec = importlib.util.spec_from_file_location("own_engine", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_engine"] = module  # where its dataclass looks for its annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    return load_model(DEFAULT_MODEL_DIR, dtype="float32")


@pytest.fixture(scope="module")
def expected(model):
    """What LLM answers, with a pool that holds everything."""
    llm = LLM(model, page_size=PAGE, max_running_requests=4, max_total_tokens=2048)
    return [output.token_ids for output in llm.generate(PROMPTS, SamplingParams(max_new_tokens=NEW))]


def test_the_answers_are_those_of_the_dense_model(model, expected):
    texts = [prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)]
    padded = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    logits = np.asarray(jax.jit(dense_logits)(model, padded))
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        choices = logits[row, len(prompt) - 1 : len(text) - 1]
        chosen = choices[np.arange(len(choices)), text[len(prompt) :]]
        np.testing.assert_allclose(chosen, choices.max(axis=1), atol=1e-3)


@pytest.mark.parametrize("host_pages", [0, 40])
def test_a_tight_pool_gives_the_same_answers(model, expected, host_pages):
    engine = load_example().OwnEngine(model, 16 * PAGE, page_size=PAGE, chunk=48, host_pages=host_pages)
    assert engine.generate(PROMPTS, NEW) == expected
    assert engine.retractions
    assert engine.cache.prefix.hit_tokens
    assert engine.cache.prefix.evicted_pages
    assert engine.generate(PROMPTS, NEW) == expected  # from what is cached by now
    if host_pages:
        assert engine.cache.host_tier.counters.loaded_pages
    assert engine.forward._cache_size() == 2
    engine.cache.check_integrity()
    assert engine.cache.held_tokens == 0


def test_what_can_never_fit_is_refused_before_anything_runs(model):
    engine = load_example().OwnEngine(model, 4 * PAGE, page_size=PAGE)
    with pytest.raises(RequestTooLarge):
        engine.generate(PROMPTS, NEW)
    with pytest.raises(ShapeError):
        engine.generate([PROMPTS[1], []], 8)
    assert not engine.waiting
    assert engine.generate([PROMPTS[1]], 8)
    assert engine.generate([], 8) == []


def test_what_exceeds_the_context_is_refused_before_anything_runs(model):
    context = model.config.context_length
    engine = load_example().OwnEngine(model, 2 * context, page_size=PAGE)
    with pytest.raises(RequestTooLarge, match=f"{context} fit"):
        engine.generate([PROMPTS[1], [65] * context], 2)
    assert not engine.waiting


def test_it_runs_as_a_command_with_and_without_prompts(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 2
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "A" * 10_000])
    with pytest.raises(SystemExit, match="tokens, and 256 fit"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
