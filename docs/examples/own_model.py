"""A model of one's own on the pool and the attention backend: plain jax, two layers, random weights.

The model knows nothing of pages: it calls ``attend`` once per layer. Its answer is compared with the same model over a
dense cache.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from engine import AttentionMetadata, CacheManager, CacheScope, FlashAttentionBackend, LayoutKey, TokenToKVPool

VOCABULARY, WIDTH, LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 96, 128, 2, 8, 2, 32
PAGE, POOL_TOKENS, CONTEXT = 16, 512, 256
STEP_TOKENS = 64  # tokens of a step, padding included: one compiled program serves all steps

Weights: TypeAlias = dict[str, jax.Array]
Attend: TypeAlias = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


def make_weights(seed: int) -> Weights:
    """Random weights; those of layers are stacked on the first axis."""
    heads = Q_HEADS + 2 * KV_HEADS
    shapes = {
        "embed": (VOCABULARY, WIDTH),
        "head": (WIDTH, VOCABULARY),
        "qkv": (LAYERS, WIDTH, heads * HEAD_DIM),
        "out": (LAYERS, Q_HEADS * HEAD_DIM, WIDTH),
        "up": (LAYERS, WIDTH, 2 * WIDTH),
        "down": (LAYERS, 2 * WIDTH, WIDTH),
    }
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {n: jax.random.normal(k, s) * s[-2] ** -0.5 for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary embedding of ``[T, heads, D]`` at ``positions[T]``."""
    angles = positions[:, None, None] * 10_000.0 ** (-jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], -1)


def forward(weights: Weights, ids: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
    """Logits ``[T, VOCABULARY]`` of tokens ``ids[T]``; ``attend`` sees to what the tokens of the past hold."""
    hidden = weights["embed"][ids]
    for layer_id in range(LAYERS):
        heads = (norm(hidden) @ weights["qkv"][layer_id]).reshape(len(ids), -1, HEAD_DIM)
        q, k, v = jnp.split(heads, [Q_HEADS, Q_HEADS + KV_HEADS], axis=1)
        mixed = attend(layer_id, rotate(q, positions), rotate(k, positions), v)
        hidden += mixed.reshape(len(ids), -1) @ weights["out"][layer_id]
        hidden += jax.nn.silu(norm(hidden) @ weights["up"][layer_id]) @ weights["down"][layer_id]
    return norm(hidden) @ weights["head"]


def norm(x: jax.Array) -> jax.Array:
    """RMS norm over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def paged_step(
    backend: FlashAttentionBackend, weights: Weights, pool: TokenToKVPool, ids: jax.Array, metadata: AttentionMetadata
) -> tuple[jax.Array, TokenToKVPool]:
    """A step over the pool, which is donated; the logits of each row's last token, and the pool."""
    buffers = list(pool.buffers)

    def attend(layer_id: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out: jax.Array
        out, buffers[layer_id] = backend(q, k, v, buffers[layer_id], metadata)
        return out

    logits = forward(weights, ids, jnp.asarray(metadata.positions), attend)
    return logits[metadata.cu_q_lens[1:] - 1], pool.replace_buffers(buffers)


def generate(weights: Weights, prompt: list[int], new_tokens: int) -> list[int]:
    """A greedy answer over the pool, for one request."""
    pool = TokenToKVPool(POOL_TOKENS, PAGE, jnp.float32, KV_HEADS, HEAD_DIM, LAYERS)
    cache = CacheManager(POOL_TOKENS, PAGE, max_requests=1, max_context_tokens=CONTEXT)
    backend = FlashAttentionBackend(page_size=PAGE, num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    step = jax.jit(partial(paged_step, backend), donate_argnums=1)
    scope = CacheScope("random weights", 0, None, "", LayoutKey.of(pool.layout.to_dict()))
    tokens, table = list(prompt), cache.page_table
    admission = cache.admit(scope, np.array(prompt, np.int32), most_tokens=len(prompt) + new_tokens)
    if admission is None:
        raise SystemExit("there is no room now: an engine lets the request wait")
    row = admission.row
    while len(tokens) < len(prompt) + new_tokens:
        start = table.kv_len(row)
        count = min(len(tokens) - start, STEP_TOKENS)  # a chunk of the prompt, or the last token
        cache.grow([row], [count])
        ids = np.zeros(STEP_TOKENS, np.int32)
        ids[:count] = tokens[start : start + count]
        metadata = AttentionMetadata.build(
            table.rows([row]), [0, count], table.kv_lens([row]), num_tokens=STEP_TOKENS, page_size=PAGE
        )
        logits, pool = step(weights, pool, ids, metadata.to_device())
        cache.mark_computed([row], [start + count])
        if start + count == len(tokens):
            tokens.append(int(jnp.argmax(logits[0])))
    cache.release(row, scope, np.array(tokens, np.int32))
    cache.check_integrity()
    return tokens[len(prompt) :]


def dense_logits(weights: Weights, tokens: list[int]) -> jax.Array:
    """The logits of all tokens by dense causal attention, without pages."""

    def attend(layer_id: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]

    return forward(weights, jnp.array(tokens), jnp.arange(len(tokens)), attend)


def main() -> None:
    """Answers a prompt that is longer than a step, and compares each token with the dense model's."""
    weights = make_weights(seed=1)
    prompt = np.random.default_rng(2).integers(0, VOCABULARY, 100).tolist()
    answer = generate(weights, prompt, new_tokens=30)
    logits = np.asarray(dense_logits(weights, prompt + answer))[len(prompt) - 1 : -1]
    short = logits.max(axis=1) - logits[np.arange(len(answer)), answer]  # 0 where the dense model chooses alike
    print("answer:", *answer)
    print(f"{(short < 1e-3).sum()} of {len(answer)} tokens are the dense model's")


if __name__ == "__main__":
    main()
