"""``impl="cpu"``: ragged paged attention in native code, where the library can be built (docs/cpu-attention.md).

The kernel reads the fused buffer without a copy, and codes as they are. Its sums are float32, or exact, whatever the
storage. A sequence's result has the same bits in any batch and on any number of threads.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from engine.attention.impl.implementation import AttentionResult
from engine.attention.impl.xla import attend_xla
from engine.attention.metadata import AttentionMetadata
from engine.attention.options import AttentionOptions, HeadArrays
from engine.distributed.mesh import varying_axes
from engine.errors import BackendUnsupported
from engine.kv.layout import stores_pairs
from engine.kv.narrow import Buffer, NarrowKV, codes_of, kind_in, row_width
from engine.native import library

TOKEN_DTYPES = ("float32", "bfloat16", "float16")
STORED_DTYPES = (*TOKEN_DTYPES, "float8_e4m3fn", "int8", "uint8")  # uint8: two int4 codes
NO_WINDOW = 2**30  # tokens, more than any context


def attend_cpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: Buffer,
    metadata: AttentionMetadata,
    heads: HeadArrays,
    options: AttentionOptions,
) -> AttentionResult:
    """Attends over a cache that holds the new tokens; see ``Implementation``.

    Raises:
        BackendUnsupported: this process does not run on a CPU, the native library cannot be built, or a dtype is
            not one of ``TOKEN_DTYPES`` and ``STORED_DTYPES``.
    """
    _check_supported(q, codes_of(fused_kv))
    # The program is chosen when the call is lowered, so a call that is traced here for another platform gets XLA's.
    result: AttentionResult = lax.platform_dependent(
        q,
        k,
        v,
        fused_kv,
        metadata,
        heads,
        cpu=functools.partial(_attend_native, options=options),
        default=functools.partial(attend_xla, options=options),
    )
    return result


def _check_supported(q: jax.Array, codes: jax.Array) -> None:
    if jax.default_backend() != "cpu":
        raise BackendUnsupported(f"attention impl='cpu' runs on a CPU, not on {jax.default_backend()}; use impl='auto'")
    for name, array, known in (("q", q, TOKEN_DTYPES), ("fused_kv", codes, STORED_DTYPES)):
        if array.dtype.name not in known:
            raise BackendUnsupported(
                f"attention impl='cpu' reads {', '.join(known)}, but {name} is {array.dtype}; use impl='xla'"
            )
    if not library.available():
        raise BackendUnsupported("attention impl='cpu' needs the native library, which is off; use impl='xla'")


def _attend_native(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: Buffer,
    metadata: AttentionMetadata,
    heads: HeadArrays,
    *,
    options: AttentionOptions,
) -> AttentionResult:
    codes = codes_of(fused_kv)
    slots, rows, lanes = codes.shape
    width = row_width(k.shape[2], kind_in(fused_kv))
    if stores_pairs(rows, lanes, k.shape[1], width):
        codes = codes.reshape(slots, 2 * rows, lanes // 2)
    operands = (
        q,
        codes,
        fused_kv.scales if isinstance(fused_kv, NarrowKV) else jnp.zeros(0, jnp.float32),
        *(jnp.asarray(array) for array in (metadata.page_table, metadata.cu_q_lens, metadata.kv_lens)),
        jnp.zeros(0, jnp.float32) if heads.sinks is None else jnp.asarray(heads.sinks, jnp.float32),
    )
    # Within shard_map the result varies over the mesh axes that any operand varies over.
    axes = varying_axes(*operands)
    lse_shape = q.shape[:2] if options.return_lse else (0,)
    shapes = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse_shape, jnp.float32)
    results = jax.ffi.ffi_call(library.ATTENTION, shapes, vmap_method="sequential")(
        *operands,
        kv_heads=np.int32(k.shape[1]),
        page_size=np.int32(options.page_size),
        window=np.int32(min(options.sliding_window or NO_WINDOW, NO_WINDOW)),
        sm_scale=np.float32(options.sm_scale),
        soft_cap=np.float32(options.soft_cap or 0.0),
    )
    out, lse = (lax.pcast(result, tuple(axes), to="varying") if axes else result for result in results)
    return AttentionResult(out.astype(jnp.float32), fused_kv, lse if options.return_lse else None)
