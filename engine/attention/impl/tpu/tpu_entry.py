"""``impl="tpu"``: whether a call is lowered for a TPU that the kernel knows; imports Pallas only then."""

from __future__ import annotations

import functools

import jax

from engine.attention.impl.implementation import AttentionResult
from engine.attention.metadata import AttentionMetadata
from engine.attention.options import AttentionOptions, HeadArrays
from engine.errors import BackendUnsupported
from engine.kv.narrow import Buffer, NarrowKV

# The generation, as the block sizes name it, of each device kind that JAX reports.
GENERATIONS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
}
QUERY_DTYPES = ("bfloat16", "float32")  # float16 would lose three bits in the matrix unit


def attend_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: Buffer,
    metadata: AttentionMetadata,
    heads: HeadArrays,
    options: AttentionOptions,
) -> AttentionResult:
    """Writes k and v, then attends; see ``Implementation``.

    Raises:
        BackendUnsupported: the call is not lowered for a known TPU, or the kernel does not take a dtype or the
            storage's padding.
    """
    generation = target_generation()
    if isinstance(fused_kv, NarrowKV):
        raise BackendUnsupported("attention impl='tpu' does not read narrow caches; use impl='xla'")
    if q.dtype.name not in QUERY_DTYPES:
        raise BackendUnsupported(f"attention impl='tpu' takes q of {' or '.join(QUERY_DTYPES)}, not {q.dtype}")
    # Only here: Pallas takes long to import, and no other platform needs it.
    from engine.attention.impl.tpu.tpu_step import ragged_paged_attention_tpu

    # Under vmap one after the other: the copies of a batched kernel would share their semaphores.
    call = jax.custom_batching.sequential_vmap(
        functools.partial(ragged_paged_attention_tpu, options=options, generation=generation)
    )
    result: AttentionResult = call(q, k, v, fused_kv, metadata, heads)
    return result


def target_generation() -> str:
    """The TPU generation that a call is lowered for: of the abstract mesh's device if it names one, else the default's.

    Raises:
        BackendUnsupported: the device is not a TPU, or not one of ``GENERATIONS``.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        kind = device.device_kind
    else:
        kind = jax.devices()[0].device_kind if jax.default_backend() == "tpu" else jax.default_backend()
    if kind not in GENERATIONS:
        raise BackendUnsupported(
            f"attention impl='tpu' runs on {', '.join(sorted(set(GENERATIONS.values())))}, not on {kind!r}; use "
            "impl='auto'"
        )
    return GENERATIONS[kind]
