"""Bits per byte of held-out text by dtype of the pool, and the tokens it holds: what a narrow cache costs and gives."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from engine.attention import AttentionMetadata
from engine.bench.plot_option import add_plot_option, require_matplotlib
from engine.bench.timing import print_table
from engine.config import KV_DTYPES
from engine.errors import ConfigError
from engine.kv import KVLayout, TokenToKVPool
from engine.models.checkpoint import load_model
from engine.models.decoder import Decoder
from engine.models.text import load_tokenizer
from engine.models.training_data import load_texts
from engine.serving.build import model_directory
from engine.serving.device.layer_attention import layer_backends
from engine.terminal import count

PAGE_SIZE = 16
BARS = {"int8": 0.002, "float8_e4m3fn": 0.01, "int4": 0.03}  # bits per byte over float32, of the model that ships


@dataclass(frozen=True)
class Quality:
    """What a dtype of the pool gives.

    Attributes:
        dtype: its name.
        bits: bits per byte of the text.
        agreement: share of positions whose most likely next token is that of a float32 pool.
        tokens: tokens that fit where one of bfloat16 does.
    """

    dtype: str
    bits: float
    agreement: float
    tokens: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options: the model, and how much text it reads."""
    parser.add_argument("--model", help="checkpoint directory (default: the Llama that ships)")
    parser.add_argument("--windows", type=count, default=8, help="windows of text (default: %(default)s)")
    parser.add_argument("--length", type=count, default=1008, help="tokens per window (default: %(default)s)")
    add_plot_option(parser, "plot error against bytes")


def run(args: argparse.Namespace) -> int:
    """Measures every dtype of the pool and prints one table; fails where the shipped model misses a bar."""
    require_matplotlib(args)
    directory = model_directory(args.model)
    model = load_model(directory, dtype=jnp.float32)
    windows, byte_count = _windows(load_tokenizer(directory), args.windows, args.length)
    found = list(measure(model, windows, byte_count))
    exact = found[0].bits
    print(f"{windows.size:,} tokens of held-out text, {byte_count:,} bytes; jax {jax.__version__} on one CPU device")
    rows = [
        [each.dtype, f"{each.bits:.4f}", f"{each.bits - exact:+.4f}", f"{each.agreement:.1%}", f"{each.tokens:.2f}"]
        for each in found
    ]
    print_table(["pool", "bits per byte", "over float32", "same best token", "tokens, bfloat16 = 1"], rows)
    if args.plot:
        from engine.bench.quality_plot import draw  # here, because it needs matplotlib

        draw(found, directory.name, args.plot)
    missed = [each.dtype for each in found if each.bits - exact > BARS.get(each.dtype, math.inf)]
    if missed and args.model is None:
        print(f"above the bar: {', '.join(missed)} ({BARS})")
        return 1
    return 0


def measure(model: Decoder, windows: npt.NDArray[np.int32], byte_count: int) -> Iterator[Quality]:
    """The quality of each dtype, float32 first: all keys and values go through a pool of that dtype.

    Args:
        model: the weights.
        windows: int32 ``[windows, length]``; every token but the first of each is predicted.
        byte_count: bytes of text in what is predicted.
    """
    best: npt.NDArray[np.int32] | None = None
    config = model.config
    layout = partial(KVLayout.create, head_num=config.num_key_value_heads, head_dim=config.head_dim)
    token_bytes = {name: layout(dtype=name, page_size=PAGE_SIZE).bytes_per_token for name in KV_DTYPES}
    for dtype in KV_DTYPES:
        loss, found = _through_pool(model, windows, dtype)
        best = found if best is None else best
        yield Quality(
            dtype,
            loss / math.log(2) / byte_count,
            float((found == best).mean()),
            token_bytes["bfloat16"] / token_bytes[dtype],
        )


def _windows(tokenizer: Any, windows: int, length: int) -> tuple[npt.NDArray[np.int32], int]:
    """Consecutive windows of the held-out text, and the bytes of what is predicted in them."""
    text = b" ".join(part.tobytes() for part in load_texts()[1]).decode("utf-8", "ignore")
    ids = np.asarray(tokenizer.encode(text), np.int32)
    windows = min(windows, ids.size // length)
    if not windows:
        raise ConfigError(f"the held-out text has {ids.size} tokens, fewer than --length {length}; lower it")
    kept = ids[: windows * length].reshape(windows, length)
    return kept, sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in kept)


def _through_pool(model: Decoder, windows: npt.NDArray[np.int32], dtype: str) -> tuple[float, npt.NDArray[np.int32]]:
    """The loss in nats of all windows together, and the most likely token after each."""
    config, length = model.config, windows.shape[1]
    pages = -(-length // PAGE_SIZE)
    heads, head_dim = config.num_key_value_heads, config.head_dim
    pool = TokenToKVPool(pages * PAGE_SIZE, PAGE_SIZE, dtype, heads, head_dim, config.num_hidden_layers)
    metadata = AttentionMetadata.build(
        np.arange(1, pages + 1, dtype=np.int32)[None],
        np.array([0, length], np.int32),
        np.array([length], np.int32),
        num_tokens=length,
        page_size=PAGE_SIZE,
    )
    backends = layer_backends(config, page_size=PAGE_SIZE, impl="auto")
    graph, weights = nnx.split(model)

    @jax.jit
    def predict(weights: Any, pool: TokenToKVPool, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, weights)

        def attend(layer_id: int, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
            out: jax.Array = backends[layer_id](q, k, v, pool.buffers[layer_id], metadata, sinks=sinks)[0]
            return out

        logits = model.logits(model(tokens, jnp.asarray(metadata.positions), attend))[:-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=-1)
        return -chosen.sum(), jnp.argmax(logits, axis=-1)

    results = [predict(weights, pool, jnp.asarray(window)) for window in windows]
    return sum(float(loss) for loss, _ in results), np.stack([np.asarray(best) for _, best in results])
