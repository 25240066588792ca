"""Engines whose pool has 8 or 4 bits: near dense attention over what is stored, warm as cold, through the host tier."""

from __future__ import annotations

import numpy as np
import pytest
from serving_support import VOCAB

from engine.serving.check import check_against_dense
from engine.serving.llm import LLM
from engine.serving.sampling_params import SamplingParams

DTYPES = ["float8_e4m3fn", "int8", "int4"]
OPTIONS = {"max_running_requests": 4, "chunked_prefill_size": 32, "page_size": 4}


def prompts(*lengths):
    rng = np.random.default_rng()
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_are_those_of_dense_attention_over_what_is_stored(llama, dtype):
    llm = LLM(llama, **OPTIONS, kv_cache_dtype=dtype)
    assert llm.pool.dtype.name == dtype
    outputs = llm.generate(prompts(1, 40, 70), SamplingParams(max_new_tokens=6), return_logits=True)
    assert llm.compiles_after_warmup == 0
    stored = check_against_dense(llama, outputs, kv_dtype=llm.pool.dtype)
    assert stored.passed, stored.describe()
    # Dense attention over what was computed is further away, or nothing was rounded.
    exact = check_against_dense(llama, outputs)
    assert exact.largest_difference > stored.largest_difference
    assert llm.metrics().kv_token_bytes == {dtype: llm.plan.model_token_bytes}
    assert llm.plan.total_bytes == llm.pool.kv_size_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_warm_prefix_answers_as_a_cold_one_through_the_host_tier_too(llama, dtype, tmp_path):
    options = OPTIONS | {
        "max_running_requests": 1,
        "max_total_tokens": 96,
        "context_length": 96,
        "kv_cache_dtype": dtype,
    }
    tier = {"host_tier_bytes": 1 << 20, "prefix_cache_dir": str(tmp_path)}
    llm, (first, other), params = LLM(llama, **options, **tier), prompts(61, 70), SamplingParams(max_new_tokens=8)
    cold, *_ = llm.generate([first], params, return_logits=True)
    warm, *_ = llm.generate([first], params, return_logits=True)
    assert warm.cached_tokens >= 56
    llm.generate([other], params)  # evicts it to the host
    back, *_ = llm.generate([first], params, return_logits=True)
    assert back.cached_tokens >= 56
    assert llm.metrics().host_tier.loaded_pages > 0
    llm.save_prefix_cache()
    again, *_ = LLM(llama, **options, **tier).generate([first], params, return_logits=True)
    assert again.cached_tokens >= 56
    for output in (warm, back, again):
        assert output.token_ids == cold.token_ids
        # The prefix has the same bytes; the last tokens are computed in another tile, and float32 sums differ in order.
        np.testing.assert_allclose(output.logits, cold.logits, atol=1e-4)
    other_dtype = {"float8_e4m3fn": "int8", "int8": "int4", "int4": "int8"}[dtype]
    strange, *_ = LLM(llama, **options | {"kv_cache_dtype": other_dtype}, **tier).generate([first], params)
    assert strange.cached_tokens == 0  # pages of another dtype are another layout
