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
from engine.batch import ParcelShape, StepParcel, unpack
from engine.kv.pool import TokenToKVPool
from engine.models.llama import Llama
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
    """

    def __init__(
        self, model: Llama, pool: TokenToKVPool, backend: FlashAttentionBackend, shapes: list[ParcelShape]
    ) -> None:
        graph, self._weights = nnx.split(model)
        self.pool = pool
        self._shapes = shapes
        self._step_function = partial(_forward, graph, backend)
        self._steps: dict[ParcelShape, Callable[..., Any]] = {}
        self._samplers: dict[tuple[bool, bool], Callable[..., Sampled]] = {}

    @property
    def num_programs(self) -> int:
        """How many programs ``compile_all`` compiles."""
        return len(self._shapes) + 4

    def compile_all(self, on_compile: Callable[[int, int], None] | None) -> None:
        """Compiles every step shape and every way to sample; calls ``on_compile`` with (done, in all) after each."""

        def compiled() -> None:
            if on_compile:
                on_compile(len(self._steps) + len(self._samplers), self.num_programs)

        for shape in self._shapes:
            step = jax.jit(partial(self._step_function, shape), donate_argnums=(1,))
            packed = jax.ShapeDtypeStruct((shape.packed_size,), jnp.int32)
            lowered = step.lower(self._weights, self.pool, packed)
            self._steps[shape] = lowered.compile()
            compiled()
        logits, inputs, _ = lowered.out_info
        for random in (False, True):
            for logprobs in (False, True):
                sampler = jax.jit(partial(sample, random=random, logprobs=logprobs))
                self._samplers[random, logprobs] = sampler.lower(logits, inputs).compile()
                compiled()

    def step(self, parcel: StepParcel, shape: ParcelShape, *, logprobs: bool) -> tuple[Sampled, jax.Array]:
        """Runs one step.

        Args:
            parcel: what the host decided.
            shape: its static shape, one of those compiled.
            logprobs: also compute log-probabilities.

        Returns:
            The sampled tokens (one a row), on the host, and the float32 logits ``[B, vocab]``, still on the device.
        """
        logits, inputs, self.pool = self._steps[shape](self._weights, self.pool, parcel.pack())
        random = bool(np.any(parcel.temperature > 0))
        return jax.device_get(self._samplers[random, logprobs](logits, inputs)), logits


def _forward(
    graph: Any, backend: FlashAttentionBackend, shape: ParcelShape, weights: Any, pool: TokenToKVPool, packed: jax.Array
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

    hidden = model(parts["token_ids"], parts["positions"], attend)
    last = jnp.maximum(metadata.cu_q_lens[1:] - 1, 0)
    inputs = SamplingInputs(
        temperature=parts["temperature"],
        top_k=parts["top_k"],
        top_p=parts["top_p"],
        seed=parts["seed"],
        position=parts["sample_position"],
    )
    return model.logits(hidden[last]), inputs, pool.replace_buffers(buffers)
