"""Generates over meshes and on one device, and reports how the two compare: one line of JSON per case."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
from engine_reports import bytes_on, pointers, unlike
from flax import nnx
from serving_support import VOCAB, make_llama

from engine import LLM, SamplingParams

OPTIONS = {"page_size": 8, "max_running_requests": 4, "chunked_prefill_size": 32}
rng = np.random.default_rng()


def answers(llm, prompts, params):
    return llm.generate(prompts, params, return_logits=True)


def run(case, model, one, prompts, params):
    llm = LLM(model, **OPTIONS, **case)
    before, shardings = pointers(llm.pool), [buffer.sharding for buffer in llm.pool.buffers]
    many = answers(llm, prompts, params)
    llm.replace_weights(model)  # by the same: nothing compiles, nothing that was cached is used
    again = answers(llm, prompts[1:2], params[1:2])
    devices = list(llm.pool.mesh.devices.flat)
    return {
        "answers": len(many),
        "unlike": unlike(one, many) + unlike(one[1:2], again) + again[0].cached_tokens,
        "moved": pointers(llm.pool) != before,
        "resharded": [buffer.sharding for buffer in llm.pool.buffers] != shardings,
        "compiles": llm.compiles_after_warmup,
        "planned": llm.plan.device_bytes,
        "measured": [bytes_on(device, llm.pool.buffers) for device in devices],
        "weights": [bytes_on(device, nnx.state(llm.model)) for device in devices],
    }


def main(kv_heads, cases):
    model = make_llama(seed=kv_heads, num_attention_heads=8, num_key_value_heads=kv_heads, hidden_size=64)
    prompts = [rng.integers(0, VOCAB, size=n).tolist() for n in (5, 40, 17, 1, 70)]
    params = [SamplingParams(max_new_tokens=12, temperature=t, seed=3) for t in (0.0, 0.0, 0.7, 0.0, 0.0)]
    one = answers(LLM(model, **OPTIONS), prompts, params)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    for case in cases:
        print(json.dumps({"case": case, "whole": whole, **run(case, model, one, prompts, params)}), flush=True)


main(*(json.loads(argument) for argument in sys.argv[1:]))
