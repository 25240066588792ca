"""Brings a head's keys and values from their pages into shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engine.attention.impl.gpu.kernel.sizes import ROWS, Ref, Sizes

SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # what the matrix unit reads


class Ring(NamedTuple):
    """Shared memory for some steps of a context, and the barriers that pass each place back and forth.

    Attributes:
        places: ``[slots, N, 2D]``: keys, and next to them values.
        full: ``[slots + 1]`` barriers of ``copies_of(N)`` arrivals; the last is for the producer alone.
        empty: ``[slots]`` barriers at which consumers return a place.
    """

    places: Ref
    full: Ref
    empty: Ref

    def halves(self, slot: jax.Array) -> tuple[Ref, Ref]:
        """Keys and values ``[N, D]`` of a place."""
        head_dim = self.places.shape[2] // 2
        keys, values = (self.places.at[slot, :, pl.ds(first, head_dim)] for first in (0, head_dim))
        return keys, values


def ring_types(sizes: Sizes, tokens: int, slots: int, readers: int) -> tuple[Any, ...]:
    """What a kernel allocates for a ring of steps of ``tokens``, each of which ``readers`` return."""
    return (
        plgpu.SMEM((slots, tokens, 2 * sizes.head_dim), sizes.dtype, transforms=SWIZZLED),
        plgpu.Barrier(num_arrivals=copies_of(sizes, tokens), num_barriers=slots + 1),
        plgpu.Barrier(num_arrivals=readers, num_barriers=slots),
    )


def fetch_steps(
    sizes: Sizes, kv_ref: Ref, table_ref: Ref, ring: Ring, done: Any, steps: jax.Array, *, row: jax.Array, head: Any,
    token_of: Callable[[jax.Array], jax.Array], alive: tuple[jax.Array, jax.Array],
) -> None:  # fmt: skip
    """Copies steps of one context into the ring, one after the other.

    Args:
        sizes: the static sizes of the call.
        kv_ref: ``[S, H, 2D]`` the cache: K and V of a head lie side by side in it.
        table_ref: ``[B, P]`` page ids; its last columns cover what a step reaches past the context.
        ring: the target.
        done: steps that this block has copied before.
        steps: number of steps to copy.
        row: row of the page table.
        head: index of the KV head.
        token_of: position of a step's first token, a multiple of N.
        alive: the first position of the context that may be read, and one past the last.
    """
    slots, tokens, _ = ring.places.shape
    run = sizes.run_tokens(tokens)

    @pl.loop(0, steps)
    def fetch(index: jax.Array) -> None:
        slot, token = (done + index) % slots, token_of(index)
        # The ids are read before the place is free, because such a read takes long.
        pages = [table_ref[row, (token + first) // sizes.page_size] for first in range(0, tokens, run)]
        wait_if(done + index >= slots, ring.empty.at[slot])
        low, high = alive[0] - token, alive[1] - token
        edge = (low > 0) | (high < tokens)
        barrier = ring.full.at[jnp.where(edge, slots, slot)]
        for first, page in zip(range(0, tokens, run), pages, strict=True):
            start = pl.multiple_of(page * sizes.page_size + (token + first) % sizes.page_size, run)
            place = ring.places.at[slot, pl.ds(first, run)]
            plgpu.copy_gmem_to_smem(kv_ref.at[pl.ds(start, run), head], place, barrier)

        @pl.when(edge)
        def silence() -> None:  # before any consumer may read the place
            plgpu.barrier_wait(ring.full.at[slots])
            _zero_outside(sizes, ring.places.at[slot], low, high)
            for _ in range(copies_of(sizes, tokens)):
                plgpu.barrier_arrive(ring.full.at[slot])


def wait_if(condition: jax.Array, barrier: Ref) -> None:
    """Waits at ``barrier`` if the condition holds."""
    pl.when(condition)(lambda: plgpu.barrier_wait(barrier))


def drain(empty: Ref, done: jax.Array) -> None:
    """Waits for the places that consumers still return: a barrier must be at rest when its block ends."""
    slots = empty.shape[0]

    @pl.loop(jnp.maximum(0, done - slots), done)
    def wait(index: jax.Array) -> None:
        plgpu.barrier_wait(empty.at[index % slots])


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
    """Number of copies that fill a step of ``tokens``."""
    return tokens // sizes.run_tokens(tokens)
