"""``impl="tpu"``: the kernel behind the attention call, where the call is lowered for a TPU."""

from __future__ import annotations

import functools

import jax

from engine.attention.metadata import AttentionMetadata
from engine.attention.options import AttentionOptions, HeadArrays
from engine.errors import BackendUnsupported

# The generation that the block sizes know, by the device kind that JAX reports.
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
    fused_kv: jax.Array,
    metadata: AttentionMetadata,
    heads: HeadArrays,
    options: AttentionOptions,
) -> tuple[jax.Array, ...]:
    """Writes k and v, then attends; arguments and results as in ``ragged_paged_attention``.

    Raises:
        BackendUnsupported: the call is not lowered for a known TPU, or a dtype or the storage's padding is none that
            the kernel takes.
    """
    generation = target_generation()
    if q.dtype.name not in QUERY_DTYPES:
        raise BackendUnsupported(f"attention impl='tpu' takes q of {' or '.join(QUERY_DTYPES)}, not {q.dtype}")
    # Only here: Pallas takes long to import, and no other platform needs it.
    from engine.attention.impl.tpu.tpu_step import ragged_paged_attention_tpu

    # Under vmap one after the other: a batched kernel would not know its copies apart.
    call = jax.custom_batching.sequential_vmap(
        functools.partial(ragged_paged_attention_tpu, options=options, generation=generation)
    )
    result: tuple[jax.Array, ...] = call(q, k, v, fused_kv, metadata, heads)
    return result


def target_generation() -> str:
    """The TPU generation that is lowered for: the abstract mesh's where one names a device, else the default's.

    Raises:
        BackendUnsupported: it is no TPU, or one whose sizes are not known here.
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
