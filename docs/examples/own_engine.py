"""An engine of one's own: continuous batching, chunked prefill, prefix sharing, retraction, a host tier; greedy.

Of this package it takes ``kv``, ``memory`` and ``attention``, and the Llama that ships. Without prompts it answers two:

    python docs/examples/own_engine.py "Alice was beginning to" "The Queen"
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from engine import (
    AttentionMetadata,
    CacheManager,
    CacheScope,
    EngineError,
    EvictedPages,
    FlashAttentionBackend,
    HostTier,
    LayoutKey,
    PageCopy,
    PageFormat,
    PageLoad,
    PageMove,
    RequestTooLarge,
    ShapeError,
    TokenToKVPool,
    copy_pages,
    read_pages,
    write_pages,
)
from engine.models import DEFAULT_MODEL_DIR, Decoder, load_model, load_tokenizer


@dataclass(eq=False)
class Request:
    """A prompt and its answer so far."""

    prompt_len: int
    tokens: list[int]  # of prompt and answer
    most_tokens: int  # whose keys and values it can need: the last token of an answer is never fed
    row: int = -1  # of the page table, while it runs
    retractions: int = 0

    def known(self) -> npt.NDArray[np.int32]:
        """Its tokens, int32 ``[n]``."""
        return np.array(self.tokens, np.int32)


def forward(
    graph: Any,
    backends: Sequence[FlashAttentionBackend],
    weights: Any,
    pool: TokenToKVPool,
    ids: Any,
    metadata: Any,
) -> tuple[jax.Array, TokenToKVPool]:
    """A step on the device: the most likely next token of each row, and the pool with the new keys and values."""
    model, buffers = nnx.merge(graph, weights), list(pool.buffers)

    def attend(layer_id: int, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
        out: jax.Array
        out, buffers[layer_id] = backends[layer_id](q, k, v, buffers[layer_id], metadata, sinks=sinks)
        return out

    hidden = model(ids, metadata.positions, attend)
    last = hidden[jnp.maximum(metadata.cu_q_lens[1:] - 1, 0)]
    return jnp.argmax(model.logits(last), axis=-1), pool.replace_buffers(buffers)


class OwnEngine:
    """Greedy answers over a pool of ``size`` tokens, in steps of at most ``chunk`` new tokens."""

    def __init__(
        self,
        model: Decoder,
        size: int,
        *,
        page_size: int = 16,
        max_running: int = 4,
        chunk: int = 64,
        host_pages: int = 0,
    ) -> None:
        config, self.max_running, self.chunk = model.config, max_running, max(chunk, max_running)
        kv_heads, layers = config.num_key_value_heads, config.num_hidden_layers
        self.pool = TokenToKVPool(size, page_size, model.dtype, kv_heads, config.head_dim, layers)
        self.cache = CacheManager(size, page_size, max_running, config.context_length)
        layout = self.pool.layout.to_dict()
        if host_pages:
            page_format = PageFormat(layers, self.pool.dtype, layout)
            self.cache.attach_host_tier(HostTier(host_pages * page_format.page_bytes, page_format))
        self.scope = CacheScope("the Llama that ships", 0, None, "", LayoutKey.of(layout))
        self.stop_ids = frozenset(config.eos_token_id)
        backends = [
            FlashAttentionBackend(
                page_size=page_size,
                num_q_heads=config.num_attention_heads,
                num_kv_heads=kv_heads,
                head_dim=config.head_dim,
                sm_scale=layer.sm_scale,
                sliding_window=layer.window,
                soft_cap=layer.soft_cap,
            )
            for layer in config.layer_attention
        ]
        graph, self.weights = nnx.split(model)
        self.forward = jax.jit(partial(forward, graph, backends), donate_argnums=1)  # the pool is written in place
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.retractions = 0

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The answers in the order of the prompts.

        Raises:
            ShapeError: a prompt is empty; no request was started.
            RequestTooLarge: one can never fit into the pool or the context; likewise.
        """
        requests = [Request(len(prompt), list(prompt), len(prompt) + max_new_tokens - 1) for prompt in prompts]
        room = min(self.cache.size, self.cache.page_table.max_context_tokens)
        for request in requests:  # before any of them runs
            if not request.prompt_len:
                raise ShapeError("a prompt has no tokens; pass at least one")
            if (most := request.most_tokens) > room:
                message = f"a request may need {most} tokens, and {room} fit; shorten its prompt"
                raise RequestTooLarge(message, requested=most, available=room)
        self.waiting += requests
        while self.waiting or self.running:
            self.step()
        return [request.tokens[request.prompt_len :] for request in requests]

    def step(self) -> None:
        """Plans a step, makes the page moves before it, runs it, and books what it has computed."""
        plan, table = self.plan(), self.cache.page_table
        requests, rows = list(plan), rows_of(plan)
        self.cache.grow(rows, np.array(list(plan.values())))
        for move in self.cache.take_moves():  # before the step, in this order
            self.make(move)
        lens, bounds = table.kv_lens(rows), np.cumsum([0, *plan.values()])
        # Two static shapes, so that two programs are compiled: one for decoding, one for steps with parts of prompts.
        num_tokens = self.max_running if bounds[-1] <= self.max_running else self.chunk
        ids = np.zeros(num_tokens, np.int32)
        ids[: bounds[-1]] = np.concatenate([r.known()[n - plan[r] : n] for r, n in zip(requests, lens, strict=True)])
        metadata = AttentionMetadata.build(
            table.rows(rows), bounds, lens, num_tokens=num_tokens, page_size=table.page_size, rows=self.max_running
        )
        chosen, self.pool = self.forward(self.weights, self.pool, ids, metadata.to_device())
        self.cache.mark_computed(rows, lens)
        for request, length, token in zip(requests, lens.tolist(), np.asarray(chosen).tolist(), strict=False):
            if plan[request] > 1:  # part of a prompt: requests that come meanwhile share its full pages
                self.cache.publish(request.row, self.scope, request.known())
            if length == len(request.tokens):  # else more of the prompt is to come
                request.tokens.append(token)
                if token in self.stop_ids or len(request.tokens) > request.most_tokens:
                    self.end_row(request)

    def plan(self) -> dict[Request, int]:
        """Which requests run, with how many tokens each: decoding ones, then parts of prompts, then those that wait."""
        table, retractions = self.cache.page_table, self.retractions
        while True:
            plan, budget = {}, self.chunk
            pending = {request: len(request.tokens) - table.kv_len(request.row) for request in self.running}
            for request in sorted(self.running, key=pending.__getitem__):
                if count := min(pending[request], budget):
                    plan[request], budget = count, budget - count
            if self.cache.has_room_to_grow(rows_of(plan), np.array(list(plan.values()), np.int64)):
                break
            self.retract(self.running[-1])
        # What was just retracted must not come straight back, or two requests would take turns for ever.
        may_admit = retractions == self.retractions or not plan
        while may_admit and self.waiting and budget:
            request = self.waiting[0]
            admission = self.cache.admit(
                self.scope, request.known(), most_tokens=request.most_tokens, counts_hit=not request.retractions
            )
            if admission is None:  # for now: no row is free, or too few pages
                break
            request.row = admission.row
            self.running.append(self.waiting.popleft())
            plan[request] = min(len(request.tokens) - table.kv_len(request.row), budget)
            budget -= plan[request]
        return plan

    def make(self, move: PageMove) -> None:
        """Makes a page move: saves evicted pages on the host, loads pages from it, or copies pages."""
        tier = self.cache.host_tier
        if isinstance(move, EvictedPages) and tier:
            tier.put(move.scope, move.token_ids, move.first_page, read_pages(self.pool, move.pages))
        elif isinstance(move, PageLoad):
            write_pages(self.pool, move.pages, move.data)
        elif isinstance(move, PageCopy):
            copy_pages(self.pool, move.sources, move.targets)

    def retract(self, request: Request) -> None:
        """Takes a request's pages back; it waits first in the queue, with the tokens that it has."""
        self.end_row(request)
        self.waiting.appendleft(request)
        request.retractions += 1
        self.retractions += 1

    def end_row(self, request: Request) -> None:
        """Gives a row back; its full pages of computed tokens stay cached until the pool is short."""
        self.cache.release(request.row, self.scope, request.known())
        self.running.remove(request)
        request.row = -1


def rows_of(requests: Any) -> npt.NDArray[np.int32]:
    """The rows of requests, int32 ``[n]``."""
    return np.array([request.row for request in requests], np.int32)


if __name__ == "__main__":
    tokenizer = load_tokenizer(DEFAULT_MODEL_DIR)
    assert tokenizer  # the Llama that ships has one
    engine = OwnEngine(load_model(DEFAULT_MODEL_DIR, dtype="float32"), size=256, host_pages=64)
    texts = sys.argv[1:] or ["Alice was beginning to", "The Queen"]
    try:
        answers = engine.generate([tokenizer.encode(text) for text in texts], max_new_tokens=48)
    except EngineError as error:
        sys.exit(str(error))
    for answer in answers:
        print(tokenizer.decode(answer))
