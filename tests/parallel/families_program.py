"""Each family from its checkpoint over a mesh and on one device: one line of JSON per family."""

from __future__ import annotations

import json
import sys
import tempfile

import jax
import numpy as np
from engine_reports import bytes_on, unlike
from flax import nnx
from random_model import random_model
from tiny_families import tiny

from engine import LLM, SamplingParams
from engine.models.checkpoint import save_model
from engine.models.model_config import ModelConfig

OPTIONS = {"dtype": "float32", "page_size": 4, "max_running_requests": 4, "chunked_prefill_size": 16}
rng = np.random.default_rng()


def run(model_type, tp):
    model = random_model(ModelConfig(**tiny(model_type, num_attention_heads=8, num_key_value_heads=2)))
    prompts = [rng.integers(0, model.config.vocab_size, size=n).tolist() for n in (5, 40, 17)]
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    with tempfile.TemporaryDirectory() as directory:
        save_model(model, directory)
        one, many = (LLM(directory, **OPTIONS, tp=devices) for devices in (1, tp))
    answers = [llm.generate(prompts, params, return_logits=True) for llm in (one, many)]
    weights = [bytes_on(device, nnx.state(many.model)) for device in many.pool.mesh.devices.flat]
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    largest = max(np.abs(answer.logits).max() for answer in answers[0])
    # A tie, which `unlike` forgives, would make the logits behind it those of another text.
    pairs = [pair for pair in zip(*answers, strict=True) if pair[0].token_ids == pair[1].token_ids]
    apart = max(float(np.abs(a.logits - b.logits).max() / largest) for a, b in pairs)
    return {
        "unlike": unlike(*answers),
        "apart": apart,
        "tokens": len(answers[1][1].token_ids),
        "weights": weights,
        "whole": whole,
    }


def main(model_types, tp):
    for model_type in model_types:
        print(json.dumps({"model_type": model_type, **run(model_type, tp)}), flush=True)


main(*(json.loads(argument) for argument in sys.argv[1:]))
