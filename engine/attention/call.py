"""The attention call: checks it, chooses a backend, runs it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from engine.attention.checks import (
    check_arrays,
    check_lengths,
    check_metadata_shapes,
    check_options,
    check_pages,
    check_scales,
    check_tensors,
    check_token_arrays,
)
from engine.attention.impl.cpu import attend_cpu
from engine.attention.impl.gpu.gpu_entry import attend_gpu
from engine.attention.metadata import AttentionMetadata, Int32Array, locate_new_tokens, running_sum
from engine.attention.impl.reference import attend_reference
from engine.attention.options import AttentionOptions, HeadArrays
from engine.attention.impl.tpu.tpu_entry import attend_tpu
from engine.attention.impl.xla import attend_xla
from engine.distributed.mesh import explicit_sharding, shard_over
from engine.errors import BackendUnsupported, ConfigError
from engine.kv.split import split_of_heads

# (q, k, v, fused_kv, metadata, heads, options) -> (out, fused_kv) or, where the options wants it, (out, fused_kv, lse);
# raises BackendUnsupported where it cannot.
Attend = Callable[
    [jax.Array, jax.Array, jax.Array, jax.Array, AttentionMetadata, HeadArrays, AttentionOptions], tuple[jax.Array, ...]
]

BACKENDS: dict[str, Attend] = {
    "tpu": attend_tpu,
    "gpu": attend_gpu,
    "cpu": attend_cpu,
    "xla": attend_xla,
    "reference": attend_reference,
}
AUTO_ORDER = ("tpu", "gpu", "cpu", "xla")  # the first that does not raise BackendUnsupported


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: jax.Array,
    *,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    page_size: int,
    sm_scale: float | jax.Array | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> tuple[jax.Array, ...]:
    """Writes the new keys and values of a ragged batch into the paged cache, then attends causally.

    Sequence ``b`` brings tokens ``cu_q_lens[b] … cu_q_lens[b + 1] - 1``; they stand at positions
    ``kv_lens[b] - q_len[b] … kv_lens[b] - 1`` of its context. Prefill, chunks, decode and padding rows (``q_len`` 0)
    mix freely. The semantics are those of ragged paged attention (arXiv 2604.15464). Pure; the cache is updated in
    place where it is donated. May be called under ``jit``; contents are checked only when the arrays are concrete.
    Where they are traced, tokens that no sequence claims get zeros and are not written, whatever the metadata says.

    Over an Explicit mesh (``jax.make_mesh`` makes one by default) the cache may be split by its heads: then each device
    attends those that it holds, and q, k, v and out are split likewise.

    Keys and values of live tokens must be finite: an infinite or NaN value may reach every query of its own sequence
    (never another sequence's). What dead slots hold is of no account.

    Args:
        q: ``[T, Hq, D]`` queries, float32, bfloat16 or float16.
        k: ``[T, H, D]`` new keys, in q's dtype; H divides Hq.
        v: ``[T, H, D]`` new values.
        fused_kv: ``[S, 2H, D]`` a layer's buffer, or its padded storage ``[S, 2H', D']``; any float dtype.
        page_table: ``[B, P]`` int32 page ids.
        cu_q_lens: ``[B + 1]`` int32 running sum of new tokens per sequence, from 0; for padding rows its last value
            goes on, or zeros follow.
        kv_lens: ``[B]`` int32 cached plus new tokens.
        page_size: tokens a page; divides S.
        sm_scale: factor on the logits; None is ``D ** -0.5``. A traced scalar is applied to q in float32.
        sliding_window: tokens a query sees, itself included; None sees all before it.
        soft_cap: logits ``s`` become ``soft_cap * tanh(s / soft_cap)``; None leaves them.
        sinks: ``[Hq]`` an extra logit per query head that joins the softmax denominator only.
        k_scale: ``[H]`` float32, above 0: the cache holds keys divided by it, as an 8-bit cache needs; None is 1.
        v_scale: as ``k_scale``, of the values.
        return_lse: whether to return the log-sum-exp of each row too.
        impl: "auto", "reference", "xla", "cpu", "tpu" or "gpu".

    Returns:
        ``out[T, Hq, D]`` in q's dtype, zero past ``cu_q_lens[B]``; the written buffer; and with ``return_lse`` the
        natural log of each softmax's denominator, ``[T, Hq]`` float32, sinks included, minus infinity past
        ``cu_q_lens[B]``. A row that sees no key has output 0 and, without a sink, minus infinity. Every new token is
        written, whatever the window. Softmax and sums are float32.

    Raises:
        ShapeError: an array has the wrong shape, dtype or (where concrete) contents.
        ConfigError: an option is out of range or ``impl`` is unknown.
        BackendUnsupported: the chosen backend cannot.
    """
    check_options(page_size=page_size, sm_scale=sm_scale, sliding_window=sliding_window, soft_cap=soft_cap)
    check_arrays(q=q, k=k, v=v, fused_kv=fused_kv, page_table=page_table, cu_q_lens=cu_q_lens, kv_lens=kv_lens)
    check_metadata_shapes(page_table, cu_q_lens, kv_lens)
    check_tensors(q, k, v, fused_kv, sinks, page_size)
    check_scales(k.shape[1], k_scale=k_scale, v_scale=v_scale)
    q, k, v, fused_kv, page_table, cu_q_lens, kv_lens = (
        _owned(array) for array in (q, k, v, fused_kv, page_table, cu_q_lens, kv_lens)
    )
    logit_scale = sm_scale if isinstance(sm_scale, jax.core.Tracer) else None
    scale = 1.0 if logit_scale is not None else _scale(sm_scale, q.shape[2])
    options = AttentionOptions(page_size, scale, sliding_window, soft_cap, return_lse)
    bounds = _padded(cu_q_lens)
    _check_contents(page_table, bounds, kv_lens, num_tokens=q.shape[0], num_slots=fused_kv.shape[0], options=options)
    metadata: AttentionMetadata = _locate(page_table, bounds, kv_lens, num_tokens=q.shape[0], page_size=page_size)
    heads = jax.tree.map(_owned, HeadArrays(sinks, k_scale, v_scale, logit_scale))
    result: tuple[jax.Array, ...] = _dispatch(q, k, v, fused_kv, metadata, heads, options=options, impl=_known(impl))
    return result


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: jax.Array,
    metadata: AttentionMetadata,
    *,
    heads: HeadArrays,
    options: AttentionOptions,
    impl: str,
) -> tuple[jax.Array, ...]:
    """As ``ragged_paged_attention``, with the step's metadata made beforehand."""
    check_arrays(q=q, k=k, v=v, fused_kv=fused_kv, **vars(metadata))
    check_metadata_shapes(metadata.page_table, metadata.cu_q_lens, metadata.kv_lens)
    check_tensors(q, k, v, fused_kv, heads.sinks, options.page_size)
    check_scales(k.shape[1], k_scale=heads.k_scale, v_scale=heads.v_scale)
    check_token_arrays(q.shape[0], out_cache_loc=metadata.out_cache_loc, positions=metadata.positions)
    metadata = jax.tree.map(_owned, dataclasses.replace(metadata, cu_q_lens=_padded(metadata.cu_q_lens)))
    _check_contents(
        metadata.page_table,
        metadata.cu_q_lens,
        metadata.kv_lens,
        num_tokens=q.shape[0],
        num_slots=fused_kv.shape[0],
        options=options,
    )
    q, k, v, fused_kv = (_owned(array) for array in (q, k, v, fused_kv))
    heads = jax.tree.map(_owned, heads)
    result: tuple[jax.Array, ...] = _dispatch(q, k, v, fused_kv, metadata, heads, options=options, impl=_known(impl))
    return result


def _owned(array: Any) -> Any:
    """A NumPy array as a copy of our own: the CPU backend may alias it, and its owner may change it meanwhile."""
    return jnp.array(array) if isinstance(array, np.ndarray) else array


def _padded(cu_q_lens: Int32Array) -> Int32Array:
    """See ``running_sum``; a sum that falls where it can be read is left to be refused."""
    padded: Int32Array = running_sum(cu_q_lens if isinstance(cu_q_lens, jax.core.Tracer) else np.asarray(cu_q_lens))
    return padded


def _scale(sm_scale: float | jax.Array | None, head_dim: int) -> float:
    return head_dim**-0.5 if sm_scale is None else float(sm_scale)


def _known(impl: str) -> str:
    if impl != "auto" and impl not in BACKENDS:
        raise ConfigError(f"impl={impl!r} is not known; choose one of auto, {', '.join(sorted(BACKENDS))}")
    return impl


def _check_contents(
    page_table: Int32Array,
    cu_q_lens: Int32Array,
    kv_lens: Int32Array,
    *,
    num_tokens: int,
    num_slots: int,
    options: AttentionOptions,
) -> None:
    if any(isinstance(array, jax.core.Tracer) for array in (page_table, cu_q_lens, kv_lens)):
        return
    table, bounds, lens = (np.asarray(array) for array in (page_table, cu_q_lens, kv_lens))
    check_lengths(bounds, lens, num_tokens=num_tokens, row_tokens=table.shape[1] * options.page_size)
    check_pages(
        table,
        bounds,
        lens,
        page_size=options.page_size,
        num_pages=num_slots // options.page_size,
        sliding_window=options.sliding_window,
    )


@functools.partial(jax.jit, static_argnames=("options", "impl"))
def _dispatch(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: jax.Array,
    metadata: AttentionMetadata,
    heads: HeadArrays,
    *,
    options: AttentionOptions,
    impl: str,
) -> tuple[jax.Array, ...]:
    sharding = explicit_sharding(fused_kv) or explicit_sharding(q)
    if sharding is not None:
        attend_share = functools.partial(_dispatch, options=options, impl=impl)
        return _over_heads(attend_share, sharding, q, k, v, fused_kv, metadata, heads, returns_lse=options.return_lse)
    if impl != "auto":
        return BACKENDS[impl](q, k, v, fused_kv, metadata, heads, options)
    refusals = []
    for name in AUTO_ORDER:
        try:
            return BACKENDS[name](q, k, v, fused_kv, metadata, heads, options)
        except BackendUnsupported as refusal:
            refusals.append(str(refusal))
    raise BackendUnsupported("no attention backend can do this: " + "; ".join(refusals))


def _over_heads(
    attend_share: Callable[..., tuple[jax.Array, ...]],
    sharding: NamedSharding,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: jax.Array,
    metadata: AttentionMetadata,
    heads: HeadArrays,
    *,
    returns_lse: bool,
) -> tuple[jax.Array, ...]:
    """Attends over an Explicit mesh: each device the heads that it holds of the cache, as ``MeshAttention`` would."""
    axis = split_of_heads("fused_kv", fused_kv)
    whole, by_head, rows = PartitionSpec(), PartitionSpec(axis), PartitionSpec(None, axis)
    of_heads = jax.tree.map(lambda array: by_head if array.ndim else whole, heads)
    split = shard_over(
        attend_share,
        sharding.mesh,
        in_specs=(rows, rows, rows, rows, whole, of_heads),
        out_specs=(rows, rows, rows)[: 2 + returns_lse],
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    result: tuple[jax.Array, ...] = split(q, k, v, fused_kv, metadata, heads)
    return result


@functools.partial(jax.jit, static_argnames=("num_tokens", "page_size"))
def _locate(
    page_table: jax.Array, cu_q_lens: jax.Array, kv_lens: jax.Array, *, num_tokens: int, page_size: int
) -> AttentionMetadata:
    positions, out_cache_loc = locate_new_tokens(
        page_table, cu_q_lens, kv_lens, num_tokens=num_tokens, page_size=page_size, xp=jnp
    )
    return AttentionMetadata(page_table, cu_q_lens, kv_lens, out_cache_loc, positions)
