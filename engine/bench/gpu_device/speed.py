"""Device time of our attention in a chain of calls, as the layers of a model make it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from engine.attention.backend import AttentionMetadata, FlashAttentionBackend
from engine.bench.gpu_device.arena import arena, like, metadata_of, new_tokens, pool_shape
from engine.bench.gpu_device.clock import time_queued
from engine.bench.gpu_device.shapes import Shape

Pools = tuple[jax.Array, ...]


def speed_task(shape: Shape, impl: str, *, slots: int, pools: int, calls: int) -> dict[str, Any]:
    """A task: ``calls`` in one program over ``pools`` pools of ``slots``, in turn."""
    return {"shape": shape.values(), "impl": impl, "slots": slots, "pools": pools, "calls": calls}


def prepare(params: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Compiles the chain of a task."""
    shape, calls = Shape.of(params["shape"]), params["calls"]
    metadata = metadata_of(shape, params["slots"])
    backend = FlashAttentionBackend(
        page_size=shape.page_size,
        num_q_heads=shape.q_heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        impl=params["impl"],
    )

    def chain(
        q: jax.Array, k: jax.Array, v: jax.Array, pools: Pools, metadata: AttentionMetadata
    ) -> tuple[jax.Array, jax.Array, Pools]:
        written, out = list(pools), q
        for i in range(calls):
            out, written[i % len(written)] = backend(q, k, v, written[i % len(written)], metadata)
            # One element, in place: the next call cannot begin before this one is done, at the price of a tiny kernel.
            k = k.at[0, 0, 0].set(out[0, 0, 0])
        return out, k, tuple(written)

    tensors = jax.eval_shape(lambda: new_tokens(shape))
    pool = jax.ShapeDtypeStruct(pool_shape(shape, params["slots"]), jnp.dtype(shape.dtype))
    program = jax.jit(chain, donate_argnums=(1, 3))
    compiled = program.lower(*tensors, (pool,) * params["pools"], like(metadata)).compile()

    def run() -> dict[str, Any]:
        q, k, v = new_tokens(shape)
        pools = arena.lend(pool.shape, shape.dtype, params["pools"])
        on_device = metadata.to_device()
        out = q

        def dispatch() -> None:
            nonlocal out, k, pools
            out, k, pools = compiled(q, k, v, pools, on_device)

        timed = time_queued(dispatch, lambda: jax.block_until_ready((out, pools)), calls)
        arena.take_back(pools)
        finite = bool(jnp.isfinite(out).all())
        return timed | rates(shape, timed["us"]) | {"finite": finite} | memory_of(compiled)

    return run


def rates(shape: Shape, us: float) -> dict[str, float]:
    """What a call of ``us`` microseconds comes to: GB/s of K and V read once, and TFLOP/s of the visible pairs."""
    return {"gb_per_s": shape.kv_bytes / us / 1e3, "tflop_per_s": shape.flops / us / 1e6}


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes of temporaries and of what is updated in place in a compiled program."""
    usage = compiled.memory_analysis()
    return {"temp_bytes": int(usage.temp_size_in_bytes), "alias_bytes": int(usage.alias_size_in_bytes)}


def line(params: dict[str, Any], result: dict[str, Any]) -> str:
    """One measurement."""
    shape = Shape.of(params["shape"])
    spread = f"{result['low_us']:,.1f} to {result['high_us']:,.1f}"
    notes = [
        note for note, told in (("host-bound", result["host_bound"]), ("NOT FINITE", not result["finite"])) if told
    ]
    return (
        f"{shape.name}, page {shape.page_size}, {params['impl']}: {result['us']:,.1f} µs ({spread}), "
        f"{result['gb_per_s']:,.0f} GB/s, {result['tflop_per_s']:,.0f} TFLOP/s; alone {result['one_us']:,.1f} µs, host "
        f"{result['host_us']:,.1f} µs, temp {result['temp_bytes'] / 1e6:,.1f} MB" + "".join(f"; {n}" for n in notes)
    )
