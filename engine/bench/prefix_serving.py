"""The prefix cache in a serving engine: what it costs where nothing is shared, and what a shared beginning saves.

Both engines are made from the same weights, of random numbers: speed does not depend on their values, and whether the
cached answers are right shows in their tokens, which must be the uncached ones.
"""

from __future__ import annotations

import dataclasses
import time
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engine.models.default_model import default_config
from engine.models.llama import Llama
from engine.serving.llm import LLM
from engine.serving.request import SamplingParams

SYSTEM_TOKENS, OWN_TOKENS, REQUESTS = 1_024, 32, 64
SLOTS = 16
SHARED_ANSWER = 4
COLD_PROMPT, COLD_ANSWER, COLD_REQUESTS = 250, 32, 16

Prompts = list[list[int]]


class Pair:
    """An engine with the prefix cache and one without.

    Args:
        page_size: tokens a page.
        hidden_size: the model's; the default model's geometry is widened alike.
    """

    def __init__(self, page_size: int, hidden_size: int = 128) -> None:
        base = default_config()
        config = dataclasses.replace(
            base,
            max_position_embeddings=2 * SYSTEM_TOKENS,
            hidden_size=hidden_size,
            intermediate_size=base.intermediate_size * hidden_size // base.hidden_size,
            num_attention_heads=hidden_size // base.head_dim,
        )
        model = Llama(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
        # Twice what runs at once: after some rounds the cache has filled it, and what it costs to evict counts too.
        pool = 2 * SLOTS * (SYSTEM_TOKENS + 64) // page_size * page_size
        self.engines = [
            LLM(
                model,
                page_size=page_size,
                max_running_requests=SLOTS,
                chunked_prefill_size=512,
                max_total_tokens=pool,
                disable_radix_cache=disabled,
                overlap_steps=False,  # what the host does is to be seen, and the engines take turns
            )
            for disabled in (False, True)
        ]
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
        self.rng = np.random.default_rng(0)
        self.vocabulary = config.vocab_size - 2

    def prompts(self, count: int, tokens: int) -> Prompts:
        """Random prompts, never the same twice."""
        drawn: Prompts = self.rng.integers(0, self.vocabulary, (count, tokens)).tolist()
        return drawn

    def time(self, llm: LLM, prompts: Prompts, new: int) -> tuple[float, list[list[int]], int]:
        """Seconds of a run, its answers, and the prompt tokens that were computed."""
        computed, start = llm.stats.prefill_tokens, time.perf_counter()
        outputs = llm.generate(prompts, SamplingParams(max_new_tokens=new, ignore_eos=True))
        seconds = time.perf_counter() - start
        return seconds, [output.token_ids for output in outputs], llm.stats.prefill_tokens - computed


def overhead_row(pair: Pair, rounds: int) -> list[str]:
    """Prompts that share nothing: how much longer the engine with the cache takes, the median of ratios.

    The two take turns step by step, so that whatever else the machine does hits both alike.
    """
    params = SamplingParams(max_new_tokens=COLD_ANSWER, ignore_eos=True)
    ratios = []
    for _ in range(rounds + 1):
        for prompt in pair.prompts(COLD_REQUESTS, COLD_PROMPT):
            for llm in pair.engines:
                llm.add_request(prompt, params)
        seconds = [0.0, 0.0]
        turn = 0
        while any(llm.scheduler.has_work for llm in pair.engines):
            for index in (0, 1) if turn % 2 else (1, 0):
                start = time.perf_counter()
                pair.engines[index].step()
                seconds[index] += time.perf_counter() - start
            turn += 1
        ratios.append(seconds[0] / seconds[1])
    share = median(ratios[1:]) - 1  # the first round warms up
    what = f"overhead, {COLD_REQUESTS} prompts that share nothing, {pair.parameters / 1e6:.1f} M parameters"
    return [what, f"{share:+.2%}", "<= 1 %"]


def shared_rows(pair: Pair, rounds: int) -> list[list[str]]:
    """Requests that begin with the same system prompt: tokens computed and time, without the cache and with it.

    Raises:
        SystemExit: the cache changed an answer.
    """
    tokens, speed = [], []
    for _ in range(rounds):
        system = pair.prompts(1, SYSTEM_TOKENS)[0]
        prompts = [system + own for own in pair.prompts(REQUESTS, OWN_TOKENS)]
        cached, plain = (pair.time(llm, prompts, SHARED_ANSWER) for llm in pair.engines)
        if cached[1] != plain[1]:
            raise SystemExit("the prefix cache changed an answer")
        tokens.append(plain[2] / cached[2])
        speed.append(plain[0] / cached[0])
    what = f"{REQUESTS} requests, {SYSTEM_TOKENS:,} tokens shared"
    return [
        [f"{what}: times fewer tokens prefilled", f"{median(tokens):.1f}", ">= 10"],
        [f"{what}: times sooner done", f"{median(speed):.1f}", ">= 3"],
    ]
