"""``impl="gpu"``: whether a call is lowered for a Hopper GPU and the kernels take it; imports Pallas only then."""

from __future__ import annotations

import functools

import jax

from engine.attention.impl.implementation import AttentionResult
from engine.attention.metadata import AttentionMetadata
from engine.attention.options import AttentionOptions, HeadArrays
from engine.distributed.mesh import varying_axes
from engine.errors import BackendUnsupported
from engine.kv.gpu_target import multiprocessors, not_hopper
from engine.kv.narrow import Buffer, NarrowKV

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
MOST_GROUP = 64  # query heads per KV head: the rows of one tile
PAGE_UNIT = 8  # tokens: rows of a swizzled tile of shared memory


def attend_gpu(
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
        BackendUnsupported: the call is not lowered for a Hopper GPU, or the kernels do not take a dtype, a size or the
            scale.
    """
    if isinstance(fused_kv, NarrowKV):
        raise BackendUnsupported("attention impl='gpu' does not read narrow caches; use impl='xla'")
    missing = not_hopper()
    if missing is not None:
        raise BackendUnsupported(f"attention impl='gpu' cannot run: {missing}; use impl='auto'")
    if axes := varying_axes(q, k, v, fused_kv):
        raise BackendUnsupported(
            f"attention impl='gpu' cannot write in place what is typed as varying over {', '.join(sorted(axes))}; pass "
            "check_vma=False to shard_map, or use impl='xla'"
        )
    check_supported(q, k, fused_kv, options)
    # Only here: Pallas takes long to import, and no other platform needs it.
    from engine.attention.impl.gpu.gpu_step import BLOCKS, ragged_paged_attention_gpu

    # Under vmap one after the other: the kernels' work lists are those of one step.
    call = jax.custom_batching.sequential_vmap(
        functools.partial(ragged_paged_attention_gpu, options=options, blocks=multiprocessors(BLOCKS))
    )
    result: AttentionResult = call(q, k, v, fused_kv, metadata, heads)
    return result


def check_supported(q: jax.Array, k: jax.Array, fused_kv: jax.Array, options: AttentionOptions) -> None:
    """Raises BackendUnsupported for what the kernels do not take; reads only shapes and dtypes."""
    if q.dtype.name not in DTYPES or fused_kv.dtype != q.dtype:
        raise BackendUnsupported(
            f"attention impl='gpu' takes q and a cache of one dtype, {' or '.join(DTYPES)}, not {q.dtype} over "
            f"{fused_kv.dtype}; use impl='xla'"
        )
    _, kv_heads, head_dim = k.shape
    if head_dim not in HEAD_DIMS or fused_kv.shape[1:] != (2 * kv_heads, head_dim):
        raise BackendUnsupported(
            f"attention impl='gpu' takes heads of {' or '.join(map(str, HEAD_DIMS))} in storage without padding, not "
            f"{kv_heads} KV heads of {head_dim} in {list(fused_kv.shape)}; use impl='xla'"
        )
    if q.shape[1] // kv_heads > MOST_GROUP:
        raise BackendUnsupported(
            f"attention impl='gpu' takes up to {MOST_GROUP} query heads per KV head, not {q.shape[1] // kv_heads}; use "
            "impl='xla'"
        )
    if options.page_size % PAGE_UNIT:
        raise BackendUnsupported(
            f"attention impl='gpu' takes pages of a multiple of {PAGE_UNIT} tokens, not {options.page_size}; use "
            "impl='xla' or another page_size"
        )
    if options.sm_scale <= 0:
        raise BackendUnsupported(f"attention impl='gpu' takes sm_scale above 0, not {options.sm_scale}; use impl='xla'")
