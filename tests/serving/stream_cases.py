"""Prompts and parameters whose answers are told as they come: long and short, drawn and greedy, one and several."""

from engine import SamplingParams

PROMPTS = ["Alice was beginning to", "The Queen", "Down, down, down. Would the fall", "A"]
_DRAWN = {"temperature": 0.9, "seed": 3}
PARAMS = [
    SamplingParams(max_new_tokens=20),
    SamplingParams(max_new_tokens=33, n=3, **_DRAWN),
    SamplingParams(max_new_tokens=1, logprobs=2),
    SamplingParams(max_new_tokens=40, logprobs=3, **_DRAWN),
]
