"""Runs steps on the device: compiles every static shape ahead, then only calls what is compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engine.attention.backend import AttentionMetadata, FlashAttentionBackend
from engine.attention.sharded import MeshAttention
from engine.batch import ParcelShape, StepParcel, unpack
from engine.kv.page_copy import PAGE_BUCKETS, HostPages, Int32, copy_pages, read_pages, write_pages
from engine.kv.pool import TokenToKVPool
from engine.models.llama import Llama
from engine.serving.placement import Placement
from engine.serving.sampler import Sampled, SamplingInputs, sample

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts the programs that XLA compiles in this process, whoever asks, from when the counter is made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == COMPILE_EVENT


class ModelRunner:
    """The device half of a step: the model's weights, the pool, and the compiled programs.

    Args:
        model: the weights.
        pool: its buffers; donated to every step and replaced by the step's result.
        backend: the attention all layers share.
        shapes: the static shapes of parcels; all have the same number of rows.
        moves_pages: whether pages will go to the host and back.
    """

    def __init__(
        self,
        model: Llama,
        pool: TokenToKVPool,
        backend: FlashAttentionBackend | MeshAttention,
        shapes: list[ParcelShape],
        *,
        moves_pages: bool,
    ) -> None:
        graph, self._weights = nnx.split(model)
        self.pool = pool
        self._shapes = shapes
        self._placement = Placement(pool.mesh)
        self._step_function = partial(_forward, graph, backend, self._placement)
        self._steps: dict[ParcelShape, Callable[..., Any]] = {}
        self._samplers: dict[tuple[bool, bool], Callable[..., Sampled]] = {}
        self._copies_ready = 0
        pages = pool.size // pool.page_size
        self._copies = [partial(self.copy, np.array([1], np.int32), np.array([2], np.int32))] if pages > 1 else []
        if moves_pages:
            # A bucket serves every count above the one before it.
            counts = [
                min(n, pages) for n, before in zip(PAGE_BUCKETS, (0, *PAGE_BUCKETS), strict=False) if before < pages
            ]
            self._copies += [partial(self._move, np.arange(1, n + 1, dtype=np.int32)) for n in counts]

    @property
    def num_programs(self) -> int:
        """How many programs ``compile_all`` compiles."""
        return len(self._shapes) + 4 + len(self._copies)

    def compile_all(self, on_compile: Callable[[int, int], None] | None) -> None:
        """Compiles every step shape and every way to sample; calls ``on_compile`` with (done, in all) after each."""

        def compiled() -> None:
            if on_compile:
                on_compile(len(self._steps) + len(self._samplers) + self._copies_ready, self.num_programs)

        for shape in self._shapes:
            step = jax.jit(partial(self._step_function, shape), donate_argnums=(1,))
            packed = self._placement.like(jax.ShapeDtypeStruct((shape.packed_size,), jnp.int32))
            lowered = step.lower(self._weights, self.pool, packed)
            self._steps[shape] = lowered.compile()
            compiled()
        logits, inputs = jax.tree.map(self._placement.like, lowered.out_info[:2])
        for random in (False, True):
            for logprobs in (False, True):
                sampler = jax.jit(partial(sample, random=random, logprobs=logprobs))
                self._samplers[random, logprobs] = sampler.lower(logits, inputs).compile()
                compiled()
        self._warm_up_copies(compiled)

    def read(self, pages: Int32) -> HostPages:
        """Copies pages of the pool to the host, as PageMover."""
        return read_pages(self.pool, pages)

    def write(self, pages: Int32, data: HostPages) -> None:
        """Copies pages from the host into the pool, in place, as PageMover."""
        write_pages(self.pool, pages, data)

    def copy(self, sources: Int32, targets: Int32) -> None:
        """Copies pages within the pool, in place, as PageMover."""
        copy_pages(self.pool, sources, targets)

    def step(self, parcel: StepParcel, shape: ParcelShape, *, logprobs: bool) -> tuple[Sampled, jax.Array]:
        """Runs one step.

        Args:
            parcel: what the host decided.
            shape: its static shape, one of those compiled.
            logprobs: also compute log-probabilities.

        Returns:
            The sampled tokens (one a row), on the host, and the float32 logits ``[B, vocab]``, still on the device.
        """
        packed = self._placement.on_device(parcel.pack())
        logits, inputs, self.pool = self._steps[shape](self._weights, self.pool, packed)
        random = bool(np.any(parcel.temperature > 0))
        return jax.device_get(self._samplers[random, logprobs](logits, inputs)), logits

    def replace_weights(self, model: Llama) -> None:
        """Takes other weights of the same shapes; every program stays compiled."""
        _, self._weights = nnx.split(model)

    def _warm_up_copies(self, compiled: Callable[[], None]) -> None:
        """Runs each copy of pages once, while no page holds anything."""
        for copy in self._copies:
            copy()
            self._copies_ready += 1
            compiled()

    def _move(self, pages: Int32) -> None:
        self.write(pages, self.read(pages))


def _forward(
    graph: Any,
    backend: FlashAttentionBackend | MeshAttention,
    placement: Placement,
    shape: ParcelShape,
    weights: Any,
    pool: TokenToKVPool,
    packed: jax.Array,
) -> tuple[jax.Array, SamplingInputs, TokenToKVPool]:
    """The traced step: unpack, run the layers through the paged cache, and project each row's last token."""
    model: Llama = nnx.merge(graph, weights)
    parts = unpack(packed, shape)
    metadata = AttentionMetadata(
        page_table=parts["page_table"],
        cu_q_lens=parts["cu_q_lens"],
        kv_lens=parts["kv_lens"],
        out_cache_loc=parts["out_cache_loc"],
        positions=parts["positions"],
    )
    buffers = list(pool.buffers)

    def attend(layer_id: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out, buffers[layer_id] = backend(q, k, v, buffers[layer_id], metadata)
        return out

    hidden = model(parts["token_ids"], parts["positions"], attend, placement.hidden)
    last = jnp.maximum(metadata.cu_q_lens[1:] - 1, 0)
    inputs = SamplingInputs(
        temperature=parts["temperature"],
        top_k=parts["top_k"],
        top_p=parts["top_p"],
        seed=parts["seed"],
        position=parts["sample_position"],
    )
    logits, inputs = placement.whole((model.logits(hidden[last]), inputs))
    return logits, inputs, pool.replace_buffers(buffers)
