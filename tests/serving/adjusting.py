"""What adjusted logits and answers must be: the rules in float64, one token and one row at a time."""

import jax
import numpy as np
from serving_support import VOCAB

from engine.serving.device import sampler
from engine.serving.device.sampler import SamplingInputs
from engine.serving.sampling_params import SamplingParams

_sample = jax.jit(sampler.sample)


def adjusted_logits(logits, prompt, answer, params, stop_ids=()):
    """The logits, float64 ``[vocab]``, by which the token behind ``answer`` is chosen."""
    x = np.array(logits, np.float64)
    for token, bias in params.biases:
        x[token] += bias
    counts = np.bincount(np.array(answer, int), minlength=x.size)
    known = counts > 0
    known[list(prompt)] = True
    x[known] = np.where(x[known] > 0, x[known] / params.repetition_penalty, x[known] * params.repetition_penalty)
    x -= counts * params.frequency_penalty + (counts > 0) * params.presence_penalty
    if len(answer) < params.min_tokens:
        x[list(stop_ids)] = -np.inf
    if params.temperature > 0 and params.min_p > 0:
        probability = np.exp((x - x.max()) / params.temperature)
        x[probability < params.min_p] = -np.inf
    return x


def answer_of(dense, prompt, params, *, stop_ids=(), index=0):
    """The answer of a loop on the host: dense logits of all tokens so far, adjusted here, then the sampler's draw."""
    answer = []
    while len(answer) < params.max_new_tokens and not (answer and answer[-1] in stop_ids):
        known = [*prompt, *answer]
        x = adjusted_logits(dense(known)[-1], prompt, answer, params, stop_ids).astype(np.float32)
        how = [params.temperature, params.top_k, params.top_p, (params.seed or 0) + index, len(known)]
        dtypes = [np.float32, np.int32, np.float32, np.int32, np.int32]
        columns = [np.array([value], dtype) for value, dtype in zip(how, dtypes, strict=True)]
        answer.append(int(_sample(x[None], SamplingInputs(*columns), False).tokens[0]))
    return answer


def random_params(rng, *, vocab=VOCAB, **fixed):
    """Parameters of which about half adjust logits, each by some of the rules."""
    drawn = {
        "temperature": float(rng.choice([0.0, 0.9])),
        "top_k": int(rng.choice([0, 20])),
        "top_p": float(rng.choice([1.0, 0.95])),
        "seed": int(rng.integers(2**31 - 200)),
    }
    if rng.random() < 0.6:
        ids = rng.choice(vocab, 6, replace=False).tolist()
        rules = {
            "min_p": rng.uniform(0.01, 0.3),
            "presence_penalty": rng.uniform(-2, 2),
            "frequency_penalty": rng.uniform(-1, 2),
            "repetition_penalty": rng.uniform(0.8, 2),
            "logit_bias": dict(zip(ids, rng.uniform(-4, 4, len(ids)).tolist(), strict=True)),
        }
        drawn |= {name: value for name, value in rules.items() if rng.random() < 0.6}
    return SamplingParams(**drawn | fixed)
