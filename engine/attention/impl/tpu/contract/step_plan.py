"""A step as numbers in scalar memory: made in XLA by ``schedule``, read in the kernel by ``items``."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax

from engine.attention.impl.tpu.contract.geometry import Geometry

Scalar = Any  # an int32 scalar, traced or not
KINDS = 3  # at most: decode rows, short extends, whole blocks


class Schedule(NamedTuple):
    """One step, int32, scalar-prefetched into SMEM. One array has all its small parts, so that one program makes them.

    Attributes:
        table: ``[B * P']`` page ids.
        runs: ``[B * P' / run_pages]``, 1 where the pages of a group are contiguous; ``[1]`` where a group is a page.
        slots: ``[T]`` slot of each new token, -1 writes nothing; ``[1]`` where the page table tells the slots.
        plan: the parts of ``plan_parts``: ``cu_q_lens`` ``[B + 1]`` running sum of new tokens per sequence, ``kv_lens``
            ``[B]`` cached plus new tokens, ``counts`` ``[KINDS]`` items of each kind, in the order of
            ``Geometry.tiles``, and of each item, one kind after the other, ``item_seq`` its sequence and
            ``item_token`` the index of its first query among the step's tokens.
    """

    table: jax.Array
    runs: jax.Array
    slots: jax.Array
    plan: jax.Array

    def at(self, geo: Geometry, part: str, index: Scalar) -> Scalar:
        """One number of a part of the plan."""
        return self.plan[plan_parts(geo.plan_rows, self.plan.shape[0])[part].start + index]


def plan_parts(rows: int, size: int) -> dict[str, range]:
    """Where each part of a plan of ``size`` numbers is, for as many sequences as it has rows."""
    items = (size - 2 * rows - 1 - KINDS) // 2
    sizes = {"cu_q_lens": rows + 1, "kv_lens": rows, "counts": KINDS, "item_seq": items, "item_token": items}
    ends = list(itertools.accumulate(sizes.values()))
    return {name: range(end - count, end) for (name, count), end in zip(sizes.items(), ends, strict=True)}
