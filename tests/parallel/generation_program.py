"""Generates over meshes and on one device, and reports how the two compare: one line of JSON a case."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
from flax import nnx
from serving_support import VOCAB, make_llama

from engine import LLM, SamplingParams

OPTIONS = {"page_size": 8, "max_running_requests": 4, "chunked_prefill_size": 32}
TIE = 1e-5  # of logits of order 0.1 to 1 in float32, summed in another order by another number of devices
rng = np.random.default_rng()


def answers(llm, prompts, params):
    return llm.generate(prompts, params, return_logits=True)


def unlike(one, many):
    """How many answers differ otherwise than by a tie of two tokens on one device."""
    count = 0
    for a, b in zip(one, many, strict=True):
        differs = [i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if x != y]
        if differs:
            logits = a.logits[differs[0]]
            tie = abs(logits[a.token_ids[differs[0]]] - logits[b.token_ids[differs[0]]]) < TIE
            print(f"answers differ at {differs[0]}, tie: {tie}", file=sys.stderr)
            count += not tie
    return count


def pointers(pool):
    return [[shard.data.unsafe_buffer_pointer() for shard in buffer.addressable_shards] for buffer in pool.buffers]


def bytes_on(device, tree):
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def run(case, model, one, prompts, params):
    llm = LLM(model, **OPTIONS, **case)
    before, shardings = pointers(llm.pool), [buffer.sharding for buffer in llm.pool.buffers]
    many = answers(llm, prompts, params)
    devices = list(llm.pool.mesh.devices.flat)
    return {
        "answers": len(many),
        "unlike": unlike(one, many),
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
