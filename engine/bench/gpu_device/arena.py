"""The pools that timed calls use: several, so that no call finds its cache in L2 from the call before."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import jax

from engine.attention import AttentionMetadata
from engine.bench.gpu_device.shapes import Shape


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(seed: int, *, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Normal numbers from the device's own generator, which compiles fast."""
    return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, dtype)


@dataclass
class Arena:
    """Random pools of equal shape on the device, kept from task to task; programs get them by donation and return them.

    Attributes:
        shape: ``[slots, 2H, D]`` of each pool.
        dtype: dtype of each pool.
        pools: the pools.
    """

    shape: tuple[int, int, int] = (0, 0, 0)
    dtype: str = ""
    pools: list[jax.Array] = field(default_factory=list)

    def lend(self, shape: tuple[int, int, int], dtype: str, count: int) -> tuple[jax.Array, ...]:
        """``count`` pools; new ones are made where those of that shape do not exist or were deleted."""
        kept = self.pools[:count] if (self.shape, self.dtype) == (shape, dtype) else []
        kept = [pool for pool in kept if not pool.is_deleted()]
        self.shape, self.dtype, self.pools = shape, dtype, []
        made = [normal(seed, shape=shape, dtype=dtype) for seed in range(len(kept), count)]
        return (*kept, *made)

    def take_back(self, pools: tuple[jax.Array, ...]) -> None:
        """Takes back the pools that a program returned."""
        self.pools = list(pools)


arena = Arena()  # one per process: two would not fit a small device


def metadata_of(shape: Shape, slots: int) -> AttentionMetadata:
    """A step's metadata, its pages scattered over a pool of ``slots``."""
    table = shape.page_table(slots // shape.page_size)
    bounds = [0, *shape.q_lens.cumsum().tolist()]
    return AttentionMetadata.build(table, bounds, shape.kv_lens, num_tokens=shape.tokens, page_size=shape.page_size)


def new_tokens(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random ``q[T, Hq, D]`` and ``k, v[T, H, D]`` of a step."""
    sizes = ((shape.q_heads, 1), (shape.kv_heads, 2), (shape.kv_heads, 3))
    q, k, v = (normal(seed, shape=(shape.tokens, n, shape.head_dim), dtype=shape.dtype) for n, seed in sizes)
    return q, k, v
