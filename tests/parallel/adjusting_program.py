"""Serves requests that adjust their logits over meshes and on one device, and reports how the two compare."""

from __future__ import annotations

import json
import sys

import numpy as np
from adjusting import random_params
from engine_reports import unlike
from serving_support import make_llama

from engine import LLM

OPTIONS = {"page_size": 8, "max_running_requests": 4, "chunked_prefill_size": 16, "context_length": 64}
VOCAB = 96  # which two devices divide


def run(axes, model, prompts, params, one):
    llm = LLM(model, **OPTIONS, **axes, max_total_tokens=160)
    many = llm.generate(prompts, params, return_logits=True)
    return {
        "unlike": unlike(one, many),
        "retractions": llm.scheduler.retractions,
        "compiles": llm.compiles_after_warmup,
    }


def main(cases):
    rng = np.random.default_rng()
    model = make_llama(vocab_size=VOCAB, num_attention_heads=8, num_key_value_heads=2, hidden_size=64)
    prompts = [rng.integers(0, VOCAB, rng.integers(1, 30)).tolist() for _ in range(9)]
    fixed = {"min_tokens": 5, "stop_token_ids": list(range(0, VOCAB, 3))}
    params = [
        random_params(rng, vocab=VOCAB, max_new_tokens=20, n=1 + 2 * (number == 4), **(fixed if number % 3 else {}))
        for number in range(9)
    ]
    one = LLM(model, **OPTIONS).generate(prompts, params, return_logits=True)
    print(json.dumps({"adjusting": sum(each.adjusts_logits or each.min_tokens > 0 for each in params)}), flush=True)
    for axes in cases:
        print(json.dumps({"case": axes, **run(axes, model, prompts, params, one)}), flush=True)


main(*(json.loads(argument) for argument in sys.argv[1:]))
