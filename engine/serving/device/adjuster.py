"""Runs what requests need that adjust their logits. A step in which none does runs nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax

from engine.distributed.placement import Placement
from engine.errors import ConfigError
from engine.serving.device.adjustments import RowAdjustments, adjusted, counted
from engine.serving.device.compiling import lower, placed
from engine.serving.device.parcel import ParcelShape, unpack
from engine.serving.device.row_entries import CHUNK_WORDS
from engine.serving.device.sampler import ToSample


@dataclass(frozen=True)
class Programs:
    """The compiled programs.

    Attributes:
        empty: makes the RowAdjustments in which nothing has been entered.
        enter: enters a chunk.
        adjust: makes the logits by which a step's rows choose.
        count: counts what they have chosen.
    """

    empty: Callable[[], RowAdjustments]
    enter: Callable[..., RowAdjustments]
    adjust: Callable[..., jax.Array]
    count: Callable[..., jax.Array]


class Adjuster:
    """What the device knows of the rows that adjust their logits, and the programs that use it.

    They stand before and after the sampler, which is the same for all steps: it takes long to compile. The memory is
    taken when the first such row is entered.

    Args:
        placement: placement of the step's arrays.
    """

    NUM_PROGRAMS = len(fields(Programs))

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._known: RowAdjustments | None = None
        self._programs: Programs | None = None

    def compile_all(self, shape: ParcelShape, to_sample: ToSample, replicas: int, compiled: Callable[[], None]) -> None:
        """Compiles every program; calls ``compiled`` after each.

        Args:
            shape: the shape of a step, of which only the rows count.
            to_sample: shapes and shardings of what a step leaves for the sampler.
            replicas: number of replicas.
            compiled: called after each.
        """
        where, like = self._placement, self._placement.like
        batch, vocab = to_sample.logits.shape
        empty = partial(RowAdjustments.empty, batch, vocab)
        known = jax.tree.map(partial(placed, sharding=where.by_replica), jax.eval_shape(empty))
        chosen = jax.ShapeDtypeStruct((batch,), "int32", sharding=where.replicated)
        adjusts, chunk = like((batch,)), like((replicas * CHUNK_WORDS,))
        adjust = jax.jit(partial(_adjust, where, shape), out_shardings=to_sample.logits.sharding)
        programs = []
        for program, arguments in (
            (jax.jit(empty, out_shardings=where.by_replica), ()),
            (jax.jit(partial(_enter, where), donate_argnums=0), (known, chunk)),
            (adjust, (known, to_sample, adjusts)),
            (
                jax.jit(partial(_count, where, shape), donate_argnums=0),
                (known.tokens, to_sample.words, chosen, adjusts),
            ),
        ):
            programs.append(lower(program, *arguments).compile())
            compiled()
        self._programs = Programs(*programs)

    def enter(self, chunk: Any) -> None:
        """Enters a chunk of every replica, int32 ``[replicas * CHUNK_WORDS]``: see ``row_entries``."""
        if self._programs is None:
            raise ConfigError("nothing is compiled; call compile_all before the first request")
        self._known = self._programs.enter(self._known or self._programs.empty(), chunk)

    def adjust(self, to_sample: ToSample, adjusts: Any) -> jax.Array:
        """The logits by which the rows of a step choose.

        Args:
            to_sample: the step's own logits, and how its rows choose.
            adjusts: int32 ``[B]``, 1 for rows that have been entered and choose by adjusted logits, else 0.
        """
        programs, known = self._entered()
        return programs.adjust(known, to_sample, adjusts)

    def count(self, to_sample: ToSample, chosen: jax.Array, adjusts: Any) -> None:
        """Counts the tokens ``chosen[B]`` of the rows that ``adjust`` was called for."""
        programs, known = self._entered()
        self._known = replace(known, tokens=programs.count(known.tokens, to_sample.words, chosen, adjusts))

    def forget(self) -> None:
        """Forgets every row and gives the memory back: a step that failed may have consumed it."""
        self._known = None

    def _entered(self) -> tuple[Programs, RowAdjustments]:
        if self._programs is None or self._known is None:
            raise ConfigError("no row has been entered that adjusts its logits; enter it before its step")
        return self._programs, self._known


def _enter(placement: Placement, known: RowAdjustments, chunk: jax.Array) -> RowAdjustments:
    entered: RowAdjustments = placement.own(placement.each_replica(RowAdjustments.entered)(known, chunk))
    return entered


def _adjust(
    placement: Placement, shape: ParcelShape, known: RowAdjustments, step: ToSample, adjusts: jax.Array
) -> jax.Array:
    def of_replica(known: RowAdjustments, step: ToSample, adjusts: jax.Array) -> jax.Array:
        parts = unpack(step.words, shape)
        words, rules = known.of(parts["req_pool_idx"])
        return adjusted(step.logits, words, rules, parts["kv_lens"], parts["temperature"], adjusts != 0)

    chosen_by: jax.Array = placement.each_replica(of_replica)(known, step, adjusts)
    return chosen_by


def _count(
    placement: Placement, shape: ParcelShape, tokens: jax.Array, words: jax.Array, chosen: jax.Array, adjusts: jax.Array
) -> jax.Array:
    def of_replica(tokens: jax.Array, words: jax.Array, chosen: jax.Array, adjusts: jax.Array) -> jax.Array:
        return counted(tokens, unpack(words, shape)["req_pool_idx"], chosen, adjusts != 0)

    noted: jax.Array = placement.own(placement.each_replica(of_replica)(tokens, words, chosen, adjusts))
    return noted
