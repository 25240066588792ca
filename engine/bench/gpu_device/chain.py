"""A program of several attention calls, one after the other, like the layers of a model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from engine.attention import AttentionMetadata, FlashAttentionBackend
from engine.bench.gpu_device.arena import arena, metadata_of, new_tokens
from engine.bench.gpu_device.shapes import Shape

Pools = tuple[jax.Array, ...]


def chain_task(shape: Shape, impl: str, *, slots: int, pools: int, calls: int) -> dict[str, Any]:
    """A task: ``calls`` calls in one program, which use ``pools`` pools of ``slots`` slots in turn."""
    return {"shape": shape.values(), "impl": impl, "slots": slots, "pools": pools, "calls": calls}


class Chain:
    """A compiled chain, and the state that it donates to itself once it is loaded.

    Attributes:
        shape: the step of each call.
        calls: number of calls in one program.
        compiled: the program.
        out: ``[T, Hq, D]`` output of the last call.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        self.shape, self.calls = Shape.of(task["shape"]), int(task["calls"])
        self.out: jax.Array
        self._pool_shape = (task["slots"], 2 * self.shape.kv_heads, self.shape.head_dim)
        self._pool_count = task["pools"]
        self._metadata = metadata_of(self.shape, task["slots"])
        tensors = jax.eval_shape(lambda: new_tokens(self.shape))
        pool = jax.ShapeDtypeStruct(self._pool_shape, jnp.dtype(self.shape.dtype))
        metadata = jax.eval_shape(lambda metadata: metadata, self._metadata)
        program = jax.jit(self._program(task["impl"]), donate_argnums=(1, 3))
        self.compiled = program.lower(*tensors, (pool,) * self._pool_count, metadata).compile()

    def _program(self, impl: str) -> Any:
        backend = FlashAttentionBackend(
            page_size=self.shape.page_size,
            num_q_heads=self.shape.q_heads,
            num_kv_heads=self.shape.kv_heads,
            head_dim=self.shape.head_dim,
            impl=impl,
        )

        def chain(
            q: jax.Array, k: jax.Array, v: jax.Array, pools: Pools, metadata: AttentionMetadata
        ) -> tuple[jax.Array, jax.Array, Pools]:
            written, out = list(pools), q
            for i in range(self.calls):
                pool = i % len(written)
                out, written[pool] = backend(q, k, v, written[pool], metadata)
                # Writes one element in place, so that no call can begin before the last one ends; costs a tiny kernel.
                k = k.at[0, 0, 0].set(out[0, 0, 0])
            return out, k, tuple(written)

        return chain

    def load(self) -> None:
        """Brings the arrays to the device."""
        self._q, self._k, self._v = new_tokens(self.shape)
        self._pools = arena.lend(self._pool_shape, self.shape.dtype, self._pool_count)
        self._on_device = self._metadata.to_device()

    def dispatch(self) -> None:
        """Queues the program once."""
        self.out, self._k, self._pools = self.compiled(self._q, self._k, self._v, self._pools, self._on_device)

    def wait(self) -> None:
        """Returns when all queued programs are done."""
        jax.block_until_ready((self.out, self._pools))

    def unload(self) -> None:
        """Returns the pools to the arena."""
        arena.take_back(self._pools)
        del self._q, self._k, self._v, self._pools, self._on_device
