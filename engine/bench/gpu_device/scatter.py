"""Section ``scatter``: writing new tokens into a large pool, ours and XLA's own scatter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.bench.gpu_device.arena import arena, normal
from engine.bench.gpu_device.clock import time_queued
from engine.bench.gpu_device.decode import SLOTS
from engine.bench.gpu_device.speed import memory_of
from engine.bench.scatter import Write, write_plainly
from engine.kv.scatter import set_kv_buffer

WRITERS: dict[str, Write] = {"ours": set_kv_buffer, ".at[].set": write_plainly}


def tasks(impl: str, *, small: bool) -> list[dict[str, Any]]:
    """Single tokens of a decode, and whole pages of a prompt; ``impl`` is not used, since the platform decides."""
    heads = {"heads": 2, "head_dim": 16} if small else {"heads": 8, "head_dim": 128}
    sizes = {"slots": 128, "calls": 2} if small else {"slots": SLOTS, "calls": 16}
    steps = [(8, 1), (16, 8)] if small else [(256, 1), (8192, 16)]
    return [
        {"tokens": tokens, "run": run, "writer": writer, "dtype": "bfloat16", **heads, **sizes}
        for tokens, run in steps
        for writer in WRITERS
    ]


def prepare(task: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Compiles a program of several writes into one pool, each to other slots, so that L2 cannot hold them all."""
    calls, tokens, slots, dtype = task["calls"], task["tokens"], task["slots"], task["dtype"]
    write = WRITERS[task["writer"]]
    shape = (slots, 2 * task["heads"], task["head_dim"])

    def program(pool: jax.Array, locs: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        for i in range(calls):
            pool = write(pool, locs[i], k, v)
        return pool

    def new(seed: int) -> jax.Array:
        made: jax.Array = normal(seed, shape=(tokens, task["heads"], task["head_dim"]), dtype=dtype)
        return made

    locs = np.stack([_slots(task, seed) for seed in range(calls)])
    like = jax.eval_shape(lambda: (normal(0, shape=shape, dtype=dtype), jnp.array(locs), new(1), new(2)))
    compiled = jax.jit(program, donate_argnums=0).lower(*like).compile()

    def run() -> dict[str, Any]:
        (pool,) = arena.lend(shape, dtype, 1)
        arguments = (jnp.array(locs), new(1), new(2))

        def dispatch() -> None:
            nonlocal pool
            pool = compiled(pool, *arguments)

        timed = time_queued(dispatch, lambda: jax.block_until_ready(pool), calls)
        arena.take_back((pool,))
        moved = 2 * tokens * shape[1] * shape[2] * jnp.dtype(dtype).itemsize  # each byte is read once and written once
        return timed | {"gb_per_s": moved / timed["us"] / 1e3} | memory_of(compiled)

    return run


def _slots(task: dict[str, Any], seed: int) -> Any:
    """``[T]`` int32: runs of ``run`` slots at random places, none in the null page."""
    runs = (
        1 + np.random.default_rng(seed).permutation(task["slots"] // task["run"] - 1)[: task["tokens"] // task["run"]]
    )
    return (runs[:, None] * task["run"] + np.arange(task["run"])).reshape(-1).astype(np.int32)


def line(task: dict[str, Any], result: dict[str, Any]) -> str:
    """One measurement, as a line."""
    return (
        f"{task['tokens']} tokens in runs of {task['run']}, {task['writer']}: {result['us']:,.1f} µs, "
        f"{result['gb_per_s']:,.0f} GB/s read and written; host {result['host_us']:,.1f} µs, temp "
        f"{result['temp_bytes'] / 1e6:,.1f} MB"
    )
