"""What must not grow: memory, arrays and compiled programs, over thousands of requests and hundreds of new weights."""

import gc
import tracemalloc

import jax
import numpy as np
import pytest
from serving_support import VOCAB, make_llama

from engine import LLM, SamplingParams

pytestmark = pytest.mark.slow
OPTIONS = {"page_size": 8, "max_running_requests": 16, "chunked_prefill_size": 64, "context_length": 32}
LEAST_GROWTH = 1 << 20  # bytes: what caches of the interpreter may still add once the engine has warmed up


def prompts_of(rng, count):
    return [rng.integers(0, VOCAB, size=int(rng.integers(1, 5))).tolist() for _ in range(count)]


def test_logprobs_of_ten_thousand_requests_leave_no_memory_and_compile_nothing():
    llm, rng = LLM(make_llama(), **OPTIONS), np.random.default_rng()
    params = SamplingParams(max_new_tokens=2, logprobs=2)

    def serve(count):
        for output in llm.generate(prompts_of(rng, count), params):
            assert len(output.logprobs) == len(output.token_ids)
        gc.collect()

    for _ in range(4):
        serve(500)
    tracemalloc.start()
    serve(500)
    before, arrays = tracemalloc.get_traced_memory()[0], len(jax.live_arrays())
    for _ in range(15):
        serve(500)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < LEAST_GROWTH, f"7,500 requests have left {grown} bytes"
    assert len(jax.live_arrays()) == arrays
    assert llm.compiles_after_warmup == 0


def test_to_generate_and_replace_weights_500_times_leaves_no_array():
    models = [make_llama(seed=seed) for seed in range(2)]
    llm, rng = LLM(models[0], **OPTIONS), np.random.default_rng()
    prompt, params = rng.integers(0, VOCAB, size=20).tolist(), SamplingParams(max_new_tokens=2)
    answers = [[], []]
    for turn in range(500):
        (output,) = llm.generate([prompt], params)
        answers[turn % 2].append(output.token_ids)
        assert output.cached_tokens == 0, "what the old weights have computed was found"
        llm.replace_weights(models[(turn + 1) % 2])
        if turn == 9:
            gc.collect()
            arrays = len(jax.live_arrays())
    gc.collect()
    assert len(jax.live_arrays()) == arrays
    assert all(each == mine[0] for mine in answers for each in mine)
    assert llm.compiles_after_warmup == 0
    llm.check_integrity()
