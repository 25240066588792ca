"""Two engines with models of their own, split over different numbers of devices, serve by turns; one line of JSON."""

from __future__ import annotations

import json
import sys

import numpy as np
from engine_reports import unlike
from serving_support import VOCAB, make_llama

from engine import LLM, SamplingParams

OPTIONS = {"page_size": 8, "max_running_requests": 4, "chunked_prefill_size": 32}
rng = np.random.default_rng()


def main(cases):
    models = [make_llama(seed=seed, num_attention_heads=8, num_key_value_heads=2) for seed in range(len(cases))]
    alone = [LLM(model, **OPTIONS) for model in models]
    split = [LLM(model, **OPTIONS, **case) for model, case in zip(models, cases, strict=True)]
    params, differ, compiles = SamplingParams(max_new_tokens=6), [0] * len(cases), []
    for _ in range(3):
        prompts = [rng.integers(0, VOCAB, size=n).tolist() for n in (5, 40, 17)]
        for each, (one, many) in enumerate(zip(alone, split, strict=True)):
            expected, got = (llm.generate(prompts, params, return_logits=True) for llm in (one, many))
            differ[each] += unlike(expected, got)
        compiles.append(split[0].compiles_after_warmup)  # of the whole process, the later engines' start included
    print(json.dumps({"unlike": differ, "compiles": compiles[-1] - compiles[0]}), flush=True)


main(*(json.loads(argument) for argument in sys.argv[1:]))
