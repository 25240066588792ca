"""Answers of the shipped model as JSON, to be run under other settings of jax: they must be the same."""

import json

from engine import LLM, SamplingParams

OPTIONS = {"page_size": 4, "max_running_requests": 8, "chunked_prefill_size": 8, "host_tier_bytes": 1 << 20}
PROMPTS = ["The old house stood", "It was a long way to the sea, and nobody had gone for years", "A", "Who is it?"]
PARAMS = [
    SamplingParams(max_new_tokens=12, temperature=1.1, top_p=0.9, seed=3, n=3, logprobs=2),
    SamplingParams(max_new_tokens=9, logprobs=1),
    SamplingParams(max_new_tokens=20, temperature=0.7, top_k=20, seed=5),
    SamplingParams(max_new_tokens=6, temperature=2.0, seed=2**31 - 1, n=2, logprobs=0),
]


def answers():
    """Of every attention for CPUs: cold, then with prefixes that the host tier has kept of a pool that is too small."""
    found = []
    for impl in ("xla", "cpu"):
        llm = LLM(**OPTIONS, attention_impl=impl, max_total_tokens=112)
        for _ in range(2):
            for output in llm.generate(PROMPTS, PARAMS):
                for answer in (output, *output.siblings):
                    logprobs = [[entry.chosen, entry.top] for entry in answer.logprobs or []]
                    found.append([answer.token_ids, answer.seed, logprobs])
        found.append(llm.metrics().host_tier.loaded_pages > 0)
    return json.loads(json.dumps(found))


if __name__ == "__main__":
    print(json.dumps(answers()))
