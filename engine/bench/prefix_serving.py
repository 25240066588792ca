"""The prefix cache in a serving engine: its cost where nothing is shared, and what a shared beginning saves.

Both engines have the same random weights: speed does not depend on their values. The cached answers are right if their
tokens equal those without the cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engine.bench.timing import median_and_interval, replaced, timed
from engine.models.decoder import Decoder
from engine.models.default_model import default_config
from engine.serving.llm import LLM
from engine.serving.sampling_params import SamplingParams

SYSTEM_TOKENS, OWN_TOKENS, REQUESTS = 1_024, 32, 64
SLOTS = 16
SHARED_ANSWER = 4
COLD_PROMPT, COLD_ANSWER, COLD_REQUESTS = 250, 32, 16
WARM_UP = 9  # rounds; after these the cache has filled the pool and evicts

Prompts = list[list[int]]


class Pair:
    """An engine with the prefix cache and one without.

    Args:
        page_size: tokens per page.
        hidden_size: of the model; its other sizes are those of the default model, scaled alike.
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
        model = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
        # Twice what runs at once: after some rounds the cache has filled it, so that the cost of eviction counts too.
        pool = 2 * SLOTS * (SYSTEM_TOKENS + 64) // page_size * page_size
        self.engines = [
            LLM(
                model,
                page_size=page_size,
                max_running_requests=SLOTS,
                chunked_prefill_size=512,
                max_total_tokens=pool,
                disable_radix_cache=disabled,
                overlap_steps=False,  # so that the host's work is visible; the engines take turns
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
        """Seconds of a run, its answers, and the number of prompt tokens that were computed."""
        computed, start = llm.stats.prefill_tokens, time.perf_counter()
        outputs = llm.generate(prompts, SamplingParams(max_new_tokens=new, ignore_eos=True))
        seconds = time.perf_counter() - start
        return seconds, [output.token_ids for output in outputs], llm.stats.prefill_tokens - computed


def overhead_rows(pair: Pair, rounds: int) -> list[list[str]]:
    """Prompts that share nothing: extra time of the engine with the cache, as a fraction of the time without it.

    The two engines take turns step by step, so that other load of the machine affects both alike. The device does the
    same work in both, and its time varies by more than the cache costs. So the time of planning and booking, where all
    of the cache's work is done, has a row of its own.
    """
    for _ in range(WARM_UP):
        _cold_round(pair)
    measured = [_cold_round(pair) for _ in range(rounds)]
    figures = {
        "planning and booking": [(host[0] - host[1]) / whole[1] for whole, host in measured],
        "whole steps": [(whole[0] - whole[1]) / whole[1] for whole, host in measured],
    }
    each = median(whole[1] for whole, _ in measured) / COLD_REQUESTS * 1e3
    name = f"overhead, nothing shared, {pair.parameters / 1e6:.1f} M parameters, {each:.0f} ms per request"
    rows = []
    for what, shares in figures.items():
        share, low, high = median_and_interval(shares)
        rows.append([f"{name}: {what}", f"{share:+.2%} ({low:+.2%} to {high:+.2%})", "<= 1 %"])
    return rows


def _cold_round(pair: Pair) -> tuple[list[float], list[float]]:
    """Seconds of all steps, and seconds of planning and booking, each with the cache and without."""
    params = SamplingParams(max_new_tokens=COLD_ANSWER, ignore_eos=True)
    for prompt in pair.prompts(COLD_REQUESTS, COLD_PROMPT):
        for llm in pair.engines:
            llm.add_request(prompt, params)
    whole: tuple[list[float], ...] = ([], [])
    host: tuple[list[float], ...] = ([], [])
    with contextlib.ExitStack() as wrapped:
        for llm, seconds in zip(pair.engines, host, strict=True):
            for name in ("next_step", "commit"):
                call = timed(seconds, getattr(llm.scheduler, name))
                wrapped.enter_context(replaced(llm.scheduler, name, call))
        steps = [timed(seconds, llm.step) for llm, seconds in zip(pair.engines, whole, strict=True)]
        while any(llm.scheduler.has_work for llm in pair.engines):
            for step in steps if len(whole[0]) % 2 else reversed(steps):
                step()
    return [sum(seconds) for seconds in whole], [sum(seconds) for seconds in host]


def shared_rows(pair: Pair, rounds: int) -> list[list[str]]:
    """Requests that begin with the same system prompt: ratios of computed tokens and of time, without to with.

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
        [f"{what}: times as fast", f"{median(speed):.1f}", ">= 3"],
    ]
