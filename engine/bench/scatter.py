"""Microseconds per call of writing new tokens into the pool, compared with XLA's own scatter, with donated buffers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.bench.timing import median_ratio, print_table, time_in_turn
from engine.kv.layout import merge_kv
from engine.kv.narrow import Buffer, NarrowKV, codes_of, is_rotated, rotate
from engine.kv.pool import TokenToKVPool
from engine.kv.scatter import quantise_xla, set_kv_buffer
from engine.terminal import count

DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "int8", "int4")
PAGE_SIZE = 16

Write = Callable[[Any, jax.Array, jax.Array, jax.Array], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options: sizes of the pool and of a call."""
    parser.add_argument(
        "--slots", type=count, default=65_536, help="token slots, a multiple of 16 (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=count, default=32, help="tokens written per call (default: %(default)s)")
    parser.add_argument("--heads", type=count, default=8, help="KV heads (default: %(default)s)")
    parser.add_argument("--head-dim", type=count, default=128, help="elements per head (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=5, help="measured rounds (default: %(default)s)")
    parser.add_argument("--calls", type=count, default=10, help="calls per round (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Measures each dtype and prints one table."""
    print(
        f"jax {jax.__version__} on {jax.default_backend()}: {args.tokens} tokens into {args.slots} + {PAGE_SIZE} slots"
    )
    header = [
        "dtype",
        "buffer MB",
        "ours µs",
        "pool µs",
        ".at[].set µs",
        "ratio",
        "temp bytes",
        ".at[].set temp",
        "moved",
    ]
    print_table(header, [_measure(dtype, args) for dtype in DTYPES])


def write_plainly(fused: Buffer, loc: jax.Array, k: jax.Array, v: jax.Array) -> Buffer:
    """The obvious scatter; into a narrow buffer, plain JAX quantises."""
    if isinstance(fused, NarrowKV):
        k = rotate(k) if is_rotated(fused) else k
        return quantise_xla(fused, loc, k, v)
    return fused.at[jnp.where(loc < 0, fused.shape[0], loc)].set(merge_kv(k, v), mode="drop")


class DonatedWriter:
    """One compiled write and the buffer that it donates to itself."""

    def __init__(self, write: Write, fused: Buffer, tokens: tuple[jax.Array, jax.Array, jax.Array]) -> None:
        self.program = jax.jit(write, donate_argnums=0).lower(fused, *tokens).compile()
        self.fused, self.tokens = fused, tokens
        self.address = codes_of(fused).unsafe_buffer_pointer()

    def __call__(self) -> None:
        """Writes once and waits."""
        self.fused = self.program(self.fused, *self.tokens)
        jax.block_until_ready(self.fused)

    @property
    def temp_bytes(self) -> int:
        """Bytes of temporaries in the compiled program."""
        usage: Any = self.program.memory_analysis()
        return int(usage.temp_size_in_bytes)

    @property
    def moved(self) -> bool:
        """Whether the buffer has another address now."""
        return bool(codes_of(self.fused).unsafe_buffer_pointer() != self.address)


def _measure(dtype: str, args: argparse.Namespace) -> list[str]:
    pool = TokenToKVPool(args.slots, PAGE_SIZE, dtype, args.heads, args.head_dim, layer_num=1)
    tokens = _random_tokens(pool, args.tokens)
    ours, plain = (
        DonatedWriter(write, jax.tree.map(jnp.copy, pool.get_fused_kv_buffer(0)), tokens)
        for write in (set_kv_buffer, write_plainly)
    )
    pool_address = codes_of(pool.get_fused_kv_buffer(0)).unsafe_buffer_pointer()
    to_pool = partial(_write_to_pool, pool, tokens)
    contenders: dict[str, Callable[[], object]] = {"ours": ours, "pool": to_pool, "plain": plain}
    # Several calls per round: before the first one, a plain scatter of the whole buffer has emptied the CPU's caches.
    timings = time_in_turn(contenders, rounds=args.rounds, calls=args.calls)
    moved = ours.moved or codes_of(pool.get_fused_kv_buffer(0)).unsafe_buffer_pointer() != pool_address
    return [
        dtype,
        f"{pool.kv_size_bytes / 1e6:.0f}",
        *(f"{timings[name].median * 1e6:,.1f}" for name in ("ours", "pool", "plain")),
        f"{median_ratio(timings['plain'], timings['ours']):,.1f}",
        f"{ours.temp_bytes:,}",
        f"{plain.temp_bytes:,}",
        "yes" if moved else "no",
    ]


def _write_to_pool(pool: TokenToKVPool, tokens: tuple[jax.Array, jax.Array, jax.Array]) -> None:
    pool.set_kv_buffer(0, *tokens)
    jax.block_until_ready(pool.get_fused_kv_buffer(0))


def _random_tokens(pool: TokenToKVPool, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng()
    loc = rng.choice(np.arange(pool.page_size, pool.size + pool.page_size), count, replace=False).astype(np.int32)
    k, v = (rng.standard_normal((count, pool.layout.head_num, pool.layout.head_dim)) for _ in range(2))
    dtype = jnp.bfloat16 if isinstance(pool.get_fused_kv_buffer(0), NarrowKV) else pool.dtype
    return jnp.asarray(loc), jnp.asarray(k, dtype), jnp.asarray(v, dtype)
