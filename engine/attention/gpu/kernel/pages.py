"""Brings a head's keys and values from their pages into shared memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engine.attention.gpu.kernel.sizes import ROWS, Sizes

Ref = Any  # a Pallas memory reference; jax has no public type for it


def pages_of(sizes: Sizes, table_ref: Ref, row: jax.Array, token: jax.Array, tokens: int) -> tuple[jax.Array, ...]:
    """The page of each copy of a step, to be read before its place is free: the read takes long.

    Args:
        sizes: of the call.
        table_ref: ``[B, P]`` page ids; its last columns cover whatever a step reaches past the context.
        row: of the table.
        token: the step's first token's position, a multiple of ``tokens``.
        tokens: of a step.
    """
    run = sizes.run_tokens(tokens)
    return tuple(table_ref[row, (token + first) // sizes.page_size] for first in range(0, tokens, run))


def fetch(
    sizes: Sizes,
    kv_ref: Ref,
    pages: tuple[jax.Array, ...],
    ring: tuple[Ref, Ref],
    slot: jax.Array,
    *,
    head: Any,
    token: jax.Array,
    alive: tuple[jax.Array, jax.Array],
) -> None:
    """Copies one step of a context; K and V of a head lie side by side in the interleaved cache.

    Args:
        sizes: of the call.
        kv_ref: ``[S, H, 2D]`` the cache.
        pages: see ``pages_of``.
        ring: ``[slots, N, 2D]`` of shared memory, and its barriers ``[slots + 1]`` of ``copies_of(N)`` arrivals.
        slot: of the ring, free.
        head: KV head.
        token: the first token's position, a multiple of N.
        alive: the first position of the context that may be read, and one past the last.
    """
    places, arrived = ring
    slots, tokens, _ = places.shape
    run = sizes.run_tokens(tokens)
    low, high = alive[0] - token, alive[1] - token
    edge = (low > 0) | (high < tokens)
    # An edge is first brought here, as it is no consumer's yet.
    barrier = arrived.at[jnp.where(edge, slots, slot)]
    for first, page in zip(range(0, tokens, run), pages, strict=True):
        start = pl.multiple_of(page * sizes.page_size + (token + first) % sizes.page_size, run)
        plgpu.copy_gmem_to_smem(kv_ref.at[pl.ds(start, run), head], places.at[slot, pl.ds(first, run)], barrier)

    @pl.when(edge)
    def silence() -> None:
        plgpu.barrier_wait(arrived.at[slots])
        _zero_outside(sizes, places.at[slot], low, high)
        for _ in range(copies_of(sizes, tokens)):
            plgpu.barrier_arrive(arrived.at[slot])


def _zero_outside(sizes: Sizes, place: Ref, low: jax.Array, high: jax.Array) -> None:
    """Zeroes the values of tokens before ``low`` or from ``high`` on: a dead slot may hold NaN, and 0 * NaN is NaN."""
    tokens, width = place.shape
    for first in range(0, tokens, ROWS):
        for column in range(sizes.head_dim, width, ROWS):
            part = place.at[pl.ds(first, ROWS), pl.ds(column, ROWS)]
            token = first + plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 0, layout=plgpu.Layout.WGMMA)
            values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            part[...] = jnp.where((token >= low) & (token < high), values, jnp.zeros_like(values))
    plgpu.commit_smem()


def copies_of(sizes: Sizes, tokens: int) -> int:
    """Copies that bring a step of ``tokens``."""
    return tokens // sizes.run_tokens(tokens)
