"""Items as the kernel reads them from scalar memory, and the blocks and pages of an item."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from engine.attention.impl.tpu.contract.geometry import Geometry
from engine.attention.impl.tpu.contract.step_plan import Scalar, Schedule


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
    seq, token = schedule.at(geo, "item_seq", index), schedule.at(geo, "item_token", index)
    left = schedule.at(geo, "cu_q_lens", seq + 1) - token
    queries, position = jnp.minimum(left, most_queries), schedule.at(geo, "kv_lens", seq) - left
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
