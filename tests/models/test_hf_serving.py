"""Checkpoints of transformers served by the whole engine: pages, chunks, batches and cached prefixes change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hf_models import GEOMETRY, UNLIKE, WINDOW, YARN_ROPE, hf_greedy, hf_logits, hf_model, save

from engine import LLM, SamplingParams
from engine.serving.request import RequestOutput

# Deprecations of transformers are not ours to fix, and the suite turns warnings into errors.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = UNLIKE | {
    "llama, yarn": ("Llama", {"rope_parameters": YARN_ROPE}),
    "mistral, window": ("Mistral", {"sliding_window": WINDOW}),
}
NEW_TOKENS = 9
CHUNK = 16  # longer than the window, and prompts are of several chunks
LENGTHS = (3, 41, 16, 70)


@pytest.mark.parametrize("case", CASES)
def test_served_alone_or_together_cold_or_warm_answers_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    theirs = hf_model(*CASES[case])
    save(theirs, tmp_path)
    rng = np.random.default_rng()
    prompts = [rng.integers(0, GEOMETRY["vocab_size"], length) for length in LENGTHS]
    expected = [hf_greedy(theirs, prompt, NEW_TOKENS) for prompt in prompts]
    logits = [
        hf_logits(theirs, np.append(prompt, answer[:-1]))[len(prompt) - 1 :]
        for prompt, answer in zip(prompts, expected, strict=True)
    ]
    llm = LLM(tmp_path, dtype="float32", page_size=4, max_running_requests=4, chunked_prefill_size=CHUNK)
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)

    def check(outputs: list[RequestOutput], which: range) -> None:
        for output, index in zip(outputs, which, strict=True):
            bound = 1e-4 * np.abs(logits[index]).max()
            np.testing.assert_allclose(output.logits, logits[index], atol=bound, rtol=0)
            assert output.token_ids == expected[index]

    alone = range(1, 2)
    cold = llm.generate([prompts[1].tolist()], params, return_logits=True)
    assert cold[0].cached_tokens == 0
    check(cold, alone)
    together = range(len(prompts))
    check(llm.generate([prompt.tolist() for prompt in prompts], params, return_logits=True), together)
    warm = llm.generate([prompt.tolist() for prompt in prompts], params, return_logits=True)
    assert [output.cached_tokens > 0 for output in warm] == [length > 4 for length in LENGTHS]
    check(warm, together)
