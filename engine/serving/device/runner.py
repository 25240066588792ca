"""Runs steps on the device: compiles every static shape ahead, then only calls what is compiled."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engine.attention import AttentionMetadata
from engine.attention.metadata import is_live, positions_of_tokens, sequence_of_tokens, slots_of_tokens
from engine.attention.window_table import WindowTable
from engine.distributed.placement import Placement
from engine.errors import ConfigError
from engine.kv.page_copy import (
    PAGE_BUCKETS,
    Int32,
    PageData,
    PageRead,
    copy_pages,
    start_reading,
    write_pages,
)
from engine.kv.pool import TokenToKVPool
from engine.models.decoder import Decoder
from engine.models.fingerprint import settings_of
from engine.serving.device.adjuster import Adjuster
from engine.serving.device.compiling import lower, placed
from engine.serving.device.device_rows import DeviceRows
from engine.serving.device.layer_attention import LayerAttention
from engine.serving.device.parcel import SHARED_PAGES, ParcelShape, StepParcel, unpack
from engine.serving.device.sampler import Sampled, SamplingInputs, ToSample, most_likely, sample

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts every program that XLA compiles in this process after the counter was made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == COMPILE_EVENT


@dataclass(frozen=True)
class StepResult:
    """A step's results on the device, ready when the step has run.

    Attributes:
        tokens: int32 ``[B]``, one token per row; B counts the rows of all replicas, one replica after the other.
        sampled: the sampler's result, with log-probabilities where the parcel asked for them; None in a greedy step.
        logits: float32 ``[B, vocab]``, perhaps split over devices; see ``ModelRunner.to_read``.
    """

    tokens: jax.Array
    sampled: Sampled | None
    logits: jax.Array


class ModelRunner:
    """The device half of a step: the model's weights, the pool, the device's rows and the compiled programs.

    Args:
        model: the weights.
        pool: donated to every step and replaced by the step's result.
        attention: the attention of the layers.
        shapes: the static shapes of each replica's parcel; all have the same number of rows.
        max_pages: pages per page-table row and group.
        moves_pages: whether pages will move to the host and back.
    """

    def __init__(
        self,
        model: Decoder,
        pool: TokenToKVPool,
        attention: LayerAttention,
        shapes: list[ParcelShape],
        *,
        max_pages: int,
        moves_pages: bool,
    ) -> None:
        graph, weights = nnx.split(model)
        self._settings = settings_of(model)
        # Kept as leaves: to flatten a tree of Python nodes at every call would take longer than the call.
        self._weights, structure = jax.tree.flatten(weights)
        self.pool = pool
        self._shapes = shapes
        self._placement = Placement(pool.mesh)
        empty = partial(DeviceRows.empty, pool.replicas * shapes[0].rows, attention.groups.num_groups, max_pages)
        self._empty_rows = jax.jit(empty, out_shardings=self._placement.by_replica)
        self.rows = self._empty_rows()
        self._step_function = partial(forward_step, graph, structure, attention, self._placement)
        self._steps: dict[ParcelShape, Callable[..., Any]] = {}
        self._sample: Callable[..., tuple[Sampled, DeviceRows]] | None = None
        self._update_rows: Callable[..., DeviceRows] | None = None
        self._gather: Callable[[jax.Array], jax.Array] | None = None
        self._adjuster = Adjuster(self._placement)
        self.parcels = 0  # checksum of all parcels, where several processes must send the same
        self._copies_ahead = jax.default_backend() != "cpu"  # the host reads a CPU's arrays without a copy
        pages = pool.size // pool.page_size
        # A copy is of one page of each group at most.
        copied = _counts_up_to(min(attention.groups.num_groups, pages // 2))
        self._copies = [partial(self.copy, *np.arange(1, 2 * n + 1, dtype=np.int32).reshape(2, n)) for n in copied]
        if moves_pages:
            self._copies += [partial(self._move, np.arange(1, n + 1, dtype=np.int32)) for n in _counts_up_to(pages)]

    @property
    def num_programs(self) -> int:
        """How many programs ``compile_all`` compiles."""
        return len(self._shapes) + 2 + self._placement.is_split + Adjuster.NUM_PROGRAMS + len(self._copies)

    def compile_all(self, on_compile: Callable[[int, int], None] | None) -> None:
        """Compiles every program; calls ``on_compile`` with (programs compiled, programs in all) after each."""
        done = count(1)

        def compiled() -> None:
            if on_compile:
                on_compile(next(done), self.num_programs)

        for shape in self._shapes:
            step = jax.jit(partial(self._step_function, shape), donate_argnums=(1, 2))
            packed = self._placement.like((self.pool.replicas * shape.packed_size,))
            lowered = lower(step, self._weights, self.pool, self.rows, packed)
            self._steps[shape] = program = lowered.compile()
            compiled()
        # The sampler is not part of the step, which is greedy: its sort takes longer to compile than a small model, and
        # would be compiled for every shape.
        to_sample = jax.tree.map(placed, lowered.out_info[0], program.output_shardings[0])
        sampler = jax.jit(partial(_sample, self._placement, shape), donate_argnums=0)
        self._sample = lower(sampler, self.rows, to_sample, to_sample.logits).compile()
        compiled()
        update = jax.jit(partial(_update, self._placement), donate_argnums=0)
        updates = self._placement.like((2 * self.pool.replicas, SHARED_PAGES))
        self._update_rows = lower(update, self.rows, updates).compile()
        compiled()
        if self._placement.is_split:
            self._gather = lower(jax.jit(self._placement.whole), to_sample.logits).compile()
            compiled()
        self._adjuster.compile_all(shape, to_sample, self.pool.replicas, compiled)
        for copy in self._copies:  # runs once, while no page holds anything
            copy()
            compiled()

    def start_reading(self, pages: Int32, *, replica: int = 0) -> PageRead:
        """Starts to copy pages of a replica's pool to the host."""
        return start_reading(self.pool, pages, replica=replica)

    def write(self, pages: Int32, data: PageData, *, replica: int = 0) -> None:
        """Copies pages from the host into a replica's pool, in place."""
        write_pages(self.pool, pages, data, replica=replica)

    def copy(self, sources: Int32, targets: Int32, *, replica: int = 0) -> None:
        """Copies pages within a replica's pool, in place."""
        copy_pages(self.pool, sources, targets, replica=replica)

    def to_read(self, logits: jax.Array) -> jax.Array:
        """A step's logits, gathered so that the host of every process can read them."""
        return logits if self._gather is None else self._gather(logits)

    def enter_rows(self, chunks: Sequence[Int32]) -> None:
        """Tells the device, before their steps, of requests that adjust their logits: see ``Batcher.entries``."""
        for chunk in chunks:
            self._adjuster.enter(self._sent(chunk))

    def step(
        self,
        parcel: StepParcel,
        shape: ParcelShape,
        earlier_updates: Sequence[Int32] = (),
        adjusts: Int32 | None = None,
    ) -> StepResult:
        """Sends a step to the device and returns without waiting for it.

        Args:
            parcel: what the host decided; it must not be changed any more.
            shape: the parcel's static shape, one of those compiled.
            earlier_updates: page-table updates to apply first, see ``Batcher.fill``.
            adjusts: which rows choose by adjusted logits, see ``Batcher.adjusts``; they have been entered.
        """
        if self._sample is None or self._update_rows is None:
            raise ConfigError("nothing is compiled; call compile_all before the first step")
        for updates in earlier_updates:
            self.rows = self._update_rows(self.rows, self._placement.on_device(updates))
        packed = self._sent(parcel.packed)
        run = self._steps[shape]
        to_sample, tokens, self.pool, self.rows = run(self._weights, self.pool, self.rows, packed)
        sampled = None
        if adjusts is not None:
            on_device = self._sent(adjusts)
            chosen_by = self._adjuster.adjust(to_sample, on_device)
            sampled, self.rows = self._sample(self.rows, to_sample, chosen_by)
            self._adjuster.count(to_sample, sampled.tokens, on_device)
            tokens = sampled.tokens
        elif parcel.wants_logprobs[0] or parcel.temperature.any():
            sampled, self.rows = self._sample(self.rows, to_sample, to_sample.logits)
            tokens = sampled.tokens
        if self._copies_ahead:
            tokens.copy_to_host_async()
        return StepResult(tokens, sampled, to_sample.logits)

    def recover(self) -> bool:
        """Makes the pool and the rows anew where a step that failed has consumed them; no row is a request's any more.

        Returns:
            Whether the pages still hold what they held before the step.

        Raises:
            Exception: whatever the device raises where it cannot make them.
        """
        self._adjuster.forget()
        if not _is_usable(self.rows):
            self.rows = self._empty_rows()
        if _is_usable(self.pool):
            return True
        self.pool.renew()
        return False

    def weights_of(self, model: Decoder) -> list[jax.Array]:
        """The weights of another model with the same shapes, for ``replace_weights``.

        Raises:
            ConfigError: a setting of the model differs.
        """
        if settings_of(model) != self._settings:
            raise ConfigError("the new model has other settings than the compiled one; make a new LLM for it")
        weights: list[jax.Array] = jax.tree.leaves(nnx.split(model)[1])
        return weights

    def replace_weights(self, weights: list[jax.Array]) -> None:
        """Takes the weights that ``weights_of`` returned; every program stays compiled."""
        self._weights = weights

    def _sent(self, array: Int32) -> Any:
        """A host array on the device; several processes must send the same."""
        if self._placement.is_shared:
            self.parcels = zlib.crc32(array.tobytes(), self.parcels)
        return self._placement.on_device(array)

    def _move(self, pages: Int32) -> None:
        self.write(pages, self.start_reading(pages).wait())


def forward_step(
    graph: Any,
    structure: Any,
    attention: LayerAttention,
    placement: Placement,
    shape: ParcelShape,
    weights: list[jax.Array],
    pool: TokenToKVPool,
    rows: DeviceRows,
    packed: jax.Array,
) -> tuple[ToSample, jax.Array, TokenToKVPool, DeviceRows]:
    """The traced step: enters new pages, locates tokens, runs the layers over the cache, picks each row's best token.

    The first five arguments are static.

    Args:
        graph: the model's ``nnx.split`` graph.
        structure: the tree structure of the weights, as from ``jax.tree.structure``.
        attention: the attention of the layers.
        placement: placement of the step's arrays.
        shape: T tokens, B rows and U new pages of each replica; the arrays below hold all replicas, one after the
            other.
        weights: the leaves of ``structure``.
        pool: buffers of the pool, donated.
        rows: page table ``[R, G, P]`` and last tokens ``[R]``, donated.
        packed: int32 ``[shape.packed_size]``, a packed StepParcel.

    Returns:
        What the sampler takes (logits ``[B, vocab]``), greedy tokens int32 ``[B]``, and the pool and the rows after the
        step.
    """
    model: Decoder = nnx.merge(graph, jax.tree.unflatten(structure, weights))
    tables = attention.tables(pool.page_size, rows.page_table.shape[2], shape.tokens)
    read = placement.each_replica(partial(read_parcel, shape, tables))
    rows, token_ids, positions, row_ids, metadata, words = read(rows, packed)
    attend = attention.over(pool.buffers, metadata)
    hidden = model(token_ids, positions, attend, placement.hidden)
    last = placement.each_replica(_last_of_each)(hidden, metadata[0].cu_q_lens)
    logits = placement.logits(model.logits(last))
    tokens = placement.whole(most_likely(logits))
    rows = placement.own(placement.each_replica(DeviceRows.with_tokens)(rows, row_ids, tokens))
    return ToSample(logits, placement.own(words)), tokens, pool.replace_buffers(attend.buffers), rows


def read_parcel(
    shape: ParcelShape, tables: Sequence[WindowTable], rows: DeviceRows, packed: jax.Array
) -> tuple[DeviceRows, jax.Array, jax.Array, jax.Array, list[AttentionMetadata], jax.Array]:
    """One replica's rows with their new pages, tokens, their positions, row ids, groups' metadata, sampler's words."""
    parts = unpack(packed, shape)
    bounds, kv_lens, row_ids = parts["cu_q_lens"], parts["kv_lens"], parts["req_pool_idx"]
    rows = rows.with_pages(parts["update_at"], parts["update_page"])
    sequences = sequence_of_tokens(bounds, num_tokens=shape.tokens, xp=jnp)
    live = is_live(bounds, num_tokens=shape.tokens, xp=jnp)
    positions = positions_of_tokens(bounds, kv_lens, sequences, live, jnp)
    computed = kv_lens - jnp.diff(bounds)
    metadata = []
    for group, table in enumerate(tables):
        pages, first = rows.pages_of(row_ids, group, table, computed), table.first_column(computed)
        lens, places = kv_lens, positions
        if first is not None:  # the sequences begin with their first columns
            lens = kv_lens - first * table.page_size
            places = jnp.where(live, positions - first[sequences] * table.page_size, 0)
        slots = slots_of_tokens(pages, sequences, live, places, table.page_size, jnp)
        metadata.append(AttentionMetadata(pages, bounds, lens, slots, places, by_table=True))
    token_ids = rows.known_tokens(parts["token_ids"], row_ids[sequences])
    return rows, token_ids, positions, row_ids, metadata, packed[: shape.sampling_size]


def _last_of_each(hidden: jax.Array, bounds: jax.Array) -> jax.Array:
    return hidden[jnp.maximum(bounds[1:] - 1, 0)]


def _sample(
    placement: Placement, shape: ParcelShape, rows: DeviceRows, step: ToSample, chosen_by: jax.Array
) -> tuple[Sampled, DeviceRows]:
    sampled, noted = placement.each_replica(partial(_sample_rows, shape))(rows, step, chosen_by)
    both: tuple[Sampled, DeviceRows] = placement.whole(sampled), placement.own(noted)
    return both


def _sample_rows(
    shape: ParcelShape, rows: DeviceRows, step: ToSample, chosen_by: jax.Array
) -> tuple[Sampled, DeviceRows]:
    """One replica's tokens; drawing and log-probabilities run only where its own rows ask for them."""
    parts = unpack(step.words, shape)
    how = SamplingInputs(parts["temperature"], parts["top_k"], parts["top_p"], parts["seed"], position=parts["kv_lens"])
    sampled = sample(step.logits, how, parts["wants_logprobs"][0] != 0, chosen_by)
    return sampled, rows.with_tokens(parts["req_pool_idx"], sampled.tokens)


def _update(placement: Placement, rows: DeviceRows, updates: jax.Array) -> DeviceRows:
    def enter(rows: DeviceRows, updates: jax.Array) -> DeviceRows:
        return rows.with_pages(updates[0], updates[1])

    updated: DeviceRows = placement.own(placement.each_replica(enter)(rows, updates))
    return updated


def _counts_up_to(pages: int) -> list[int]:
    """A number of pages for each program that copies up to ``pages``: a bucket serves all above the one before it."""
    return [min(n, pages) for n, before in zip(PAGE_BUCKETS, (0, *PAGE_BUCKETS), strict=False) if before < pages]


def _is_usable(tree: Any) -> bool:
    """Whether no array was donated to a program that failed, or computed by one."""
    try:
        jax.block_until_ready(tree)
    except Exception:  # what the failed program raised, or jax's RuntimeError for a deleted array
        return False
    return not any(array.is_deleted() for array in jax.tree.leaves(tree))
