"""The step as the kernel reads it from scalar memory, and the blocks and pages of an item."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from engine.attention.impl.tpu.kernel.geometry import Geometry

Scalar = Any  # an int32 scalar, traced or not


class Schedule(NamedTuple):
    """The items of one step, int32, scalar-prefetched into SMEM.

    Attributes:
        table: ``[B * P']`` page ids.
        runs: ``[B * P' / run_pages]``, 1 where the pages of a group are contiguous; ``[1]`` where a group is a page.
        cu_q_lens: ``[B + 1]`` running sum of new tokens per sequence.
        kv_lens: ``[B]`` cached plus new tokens.
        slots: ``[T]`` slot of each new token; -1 writes nothing.
        counts: ``[kinds]`` items of each kind, in the order of ``Geometry.tiles``.
        item_seq: ``[N]`` sequence of each item, one kind after the other.
        item_token: ``[N]`` index of its first query among the step's tokens.
    """

    table: jax.Array
    runs: jax.Array
    cu_q_lens: jax.Array
    kv_lens: jax.Array
    slots: jax.Array
    counts: jax.Array
    item_seq: jax.Array
    item_token: jax.Array


class Item(NamedTuple):
    """A block of queries of one sequence, and the keys ``[low, high)`` that they see; all scalars.

    Attributes:
        seq: the sequence.
        token: index of the first query among the step's tokens.
        queries: number of queries.
        position: position of the first query in its sequence.
        low: position of the first key that any query sees.
        high: one past the last such key; not past ``low`` where they see none.
    """

    seq: Scalar
    token: Scalar
    queries: Scalar
    position: Scalar
    low: Scalar
    high: Scalar


def make_item(geo: Geometry, schedule: Schedule, index: Scalar, most_queries: int) -> Item:
    """The ``index``-th item of the step, of at most ``most_queries`` queries."""
    seq, token = schedule.item_seq[index], schedule.item_token[index]
    left = schedule.cu_q_lens[seq + 1] - token
    queries, position = jnp.minimum(left, most_queries), schedule.kv_lens[seq] - left
    low = position * 0 if geo.window is None else jnp.maximum(position - geo.window + 1, 0)
    return Item(seq, token, queries, position, low, jnp.maximum(position + queries, 0))


def page_id(geo: Geometry, schedule: Schedule, seq: Scalar, index: Scalar) -> Scalar:
    """Id of the page that holds tokens ``index * page_size …`` of a sequence."""
    return schedule.table[seq * geo.table_pages + index]


def block_range(geo: Geometry, item: Item, fetch_pages: int) -> tuple[Scalar, Scalar]:
    """First fetch block of an item, and one past the last."""
    tokens = fetch_pages * geo.page_size
    first = item.low // tokens
    # An item that sees no key has one block without a page, so that its turn starts the next item's fetch.
    return first, jnp.maximum(pl.cdiv(item.high, tokens), first + 1)


def page_range(geo: Geometry, item: Item, block: Scalar, fetch_pages: int) -> tuple[Scalar, Scalar]:
    """First page of a block that the item sees, and one past the last: only these are fetched."""
    first = jnp.maximum(item.low // geo.page_size, block * fetch_pages)
    last = jnp.minimum(pl.cdiv(item.high, geo.page_size), (block + 1) * fetch_pages)
    return first, last
