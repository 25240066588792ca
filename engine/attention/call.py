"""The attention call: checks it, chooses an implementation, and writes and scales for those that do not."""

from __future__ import annotations

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
from engine.attention.impl.implementation import AttentionResult, Implementation
from engine.attention.impl.reference import attend_reference
from engine.attention.impl.tpu.tpu_entry import attend_tpu
from engine.attention.impl.xla import attend_xla
from engine.attention.metadata import AttentionMetadata, Int32Array, locate_new_tokens, running_sum
from engine.attention.options import AttentionOptions, HeadArrays, scale_or_default
from engine.distributed.mesh import explicit_sharding, shard_over
from engine.errors import BackendUnsupported, ConfigError
from engine.kv.narrow import Buffer, NarrowKV, codes_of, is_rotated, rotate
from engine.kv.scatter import set_kv_buffer
from engine.kv.split import split_of_heads

IMPLEMENTATIONS = {
    "tpu": Implementation(attend_tpu, fuses_write=True),
    "gpu": Implementation(attend_gpu, fuses_write=True),
    "cpu": Implementation(attend_cpu),
    "xla": Implementation(attend_xla),
    "reference": Implementation(attend_reference),
}
AUTO_ORDER = ("tpu", "gpu", "cpu", "xla")  # the first that does not raise BackendUnsupported


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: Buffer,
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
) -> tuple[Any, ...]:
    """Writes the new keys and values of a ragged batch into the paged cache, then attends causally.

    Sequence ``b`` brings tokens ``cu_q_lens[b] … cu_q_lens[b + 1] - 1``; they stand at positions
    ``kv_lens[b] - q_len[b] … kv_lens[b] - 1`` of its context. Prefill, chunks, decode and padding rows (``q_len`` 0)
    mix freely. The semantics are those of ragged paged attention (arXiv 2604.15464). Pure; the cache is updated in
    place where it is donated. May be called under ``jit``; contents are checked only when the arrays are concrete.
    Where they are traced, tokens that belong to no sequence get zeros and are not written, whatever values arrive.

    Over an Explicit mesh (``jax.make_mesh`` makes one by default) the cache may be split by its heads: then each device
    attends the heads that it holds, and q, k, v and out are split likewise.

    Keys and values of live tokens must be finite: an infinite or NaN value may reach every query of its own sequence
    (never another sequence's). Dead slots may hold anything.

    Args:
        q: ``[T, Hq, D]`` queries, float32, bfloat16 or float16.
        k: ``[T, H, D]`` new keys, in q's dtype; H divides Hq.
        v: ``[T, H, D]`` new values.
        fused_kv: ``[S, 2H, D]`` a layer's buffer, or its padded storage ``[S, 2H', D']``, of any float dtype; or a
            ``NarrowKV`` of int8 or int4 codes with their scales: attention is then over the values that they stand for.
        page_table: ``[B, P]`` int32 page ids.
        cu_q_lens: ``[B + 1]`` int32 running sum of new tokens per sequence, from 0; padding rows repeat its last value,
            or are zeros.
        kv_lens: ``[B]`` int32 cached plus new tokens.
        page_size: tokens per page; divides S.
        sm_scale: factor on the logits; None is ``D ** -0.5``. A traced scalar is applied to q in float32.
        sliding_window: tokens that a query sees, itself included; None sees all before it.
        soft_cap: logits ``s`` become ``soft_cap * tanh(s / soft_cap)``; None leaves them.
        sinks: ``[Hq]`` an extra logit per query head that joins the softmax denominator only.
        k_scale: ``[H]`` float32, above 0: the cache holds keys divided by it, as an 8-bit cache needs; None is 1.
        v_scale: as ``k_scale``, for the values.
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
        BackendUnsupported: the implementation that ``impl`` names, or with "auto" each of them, cannot do this.
    """
    check_options(page_size=page_size, sm_scale=sm_scale, sliding_window=sliding_window, soft_cap=soft_cap)
    logit_scale = sm_scale if isinstance(sm_scale, jax.core.Tracer) else None
    q, k, v, fused_kv, page_table, cu_q_lens, kv_lens, heads = _checked(
        q, k, v, fused_kv, page_table, cu_q_lens, kv_lens, HeadArrays(sinks, k_scale, v_scale, logit_scale),
        page_size=page_size, sliding_window=sliding_window,
    )  # fmt: skip
    scale = 1.0 if logit_scale is not None else scale_or_default(sm_scale, q.shape[2])
    options = AttentionOptions(page_size, scale, sliding_window, soft_cap, return_lse)
    metadata: AttentionMetadata = _locate(page_table, cu_q_lens, kv_lens, num_tokens=q.shape[0], page_size=page_size)
    result: AttentionResult = _run(q, k, v, fused_kv, metadata, heads, options=options, impl=_known(impl))
    return result.plain()


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: Buffer,
    metadata: AttentionMetadata,
    *,
    heads: HeadArrays,
    options: AttentionOptions,
    impl: str,
) -> AttentionResult:
    """As ``ragged_paged_attention``, with the step's metadata made beforehand and a named result."""
    loc, positions = metadata.out_cache_loc, metadata.positions
    check_arrays(out_cache_loc=loc, positions=positions)
    q, k, v, fused_kv, page_table, cu_q_lens, kv_lens, heads = _checked(
        q, k, v, fused_kv, metadata.page_table, metadata.cu_q_lens, metadata.kv_lens, heads,
        page_size=options.page_size, sliding_window=options.sliding_window,
    )  # fmt: skip
    check_token_arrays(q.shape[0], out_cache_loc=loc, positions=positions)
    located = _owned(loc), _owned(positions), metadata.by_table
    metadata = AttentionMetadata(page_table, cu_q_lens, kv_lens, *located)
    result: AttentionResult = _run(q, k, v, fused_kv, metadata, heads, options=options, impl=_known(impl))
    return result


def _known(impl: str) -> str:
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ConfigError(f"impl={impl!r} is not known; choose one of auto, {', '.join(sorted(IMPLEMENTATIONS))}")
    return impl


def _checked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: Buffer,
    page_table: Int32Array,
    cu_q_lens: Int32Array,
    kv_lens: Int32Array,
    heads: HeadArrays,
    *,
    page_size: int,
    sliding_window: int | None,
) -> tuple[Any, ...]:
    """Checks a call's arrays and returns them, ``cu_q_lens`` padded with its last value, none of them the caller's."""
    stored = {"fused_kv": fused_kv} if not isinstance(fused_kv, NarrowKV) else dict(fused_kv._asdict())
    check_arrays(q=q, k=k, v=v, **stored, page_table=page_table, cu_q_lens=cu_q_lens, kv_lens=kv_lens)
    check_metadata_shapes(page_table, cu_q_lens, kv_lens)
    check_tensors(q, k, v, fused_kv, heads.sinks, page_size)
    check_scales(k.shape[1], k_scale=heads.k_scale, v_scale=heads.v_scale)
    # Where it can be read, a sum that falls is left as it is, to be refused.
    cu_q_lens = running_sum(cu_q_lens if isinstance(cu_q_lens, jax.core.Tracer) else np.asarray(cu_q_lens))
    if not any(isinstance(array, jax.core.Tracer) for array in (page_table, cu_q_lens, kv_lens)):
        table, bounds, lens = (np.asarray(array) for array in (page_table, cu_q_lens, kv_lens))
        check_lengths(bounds, lens, num_tokens=q.shape[0], row_tokens=table.shape[1] * page_size)
        num_pages = codes_of(fused_kv).shape[0] // page_size
        check_pages(table, bounds, lens, page_size=page_size, num_pages=num_pages, sliding_window=sliding_window)
    arrays: tuple[Any, ...] = jax.tree.map(_owned, (q, k, v, fused_kv, page_table, cu_q_lens, kv_lens, heads))
    return arrays


def _owned(array: Any) -> Any:
    """A NumPy array as a copy: the CPU backend may alias it, and its owner may change it before the call has run."""
    return jnp.array(array) if isinstance(array, np.ndarray) else array


@functools.partial(jax.jit, static_argnames=("num_tokens", "page_size"))
def _locate(
    page_table: jax.Array, cu_q_lens: jax.Array, kv_lens: jax.Array, *, num_tokens: int, page_size: int
) -> AttentionMetadata:
    positions, out_cache_loc = locate_new_tokens(
        page_table, cu_q_lens, kv_lens, num_tokens=num_tokens, page_size=page_size, xp=jnp
    )
    return AttentionMetadata(page_table, cu_q_lens, kv_lens, out_cache_loc, positions, by_table=True)


@functools.partial(jax.jit, static_argnames=("options", "impl"))
def _run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fused_kv: Buffer,
    metadata: AttentionMetadata,
    heads: HeadArrays,
    *,
    options: AttentionOptions,
    impl: str,
) -> AttentionResult:
    """Runs the implementation ``impl``, or for "auto" the first that can."""
    sharding = explicit_sharding(codes_of(fused_kv)) or explicit_sharding(q)
    if sharding is not None:
        run_part = functools.partial(_run, options=options, impl=impl)
        return _over_heads(run_part, sharding, (q, k, v, fused_kv, metadata, heads))
    # Cached, because a second write, whose result is not read, would cost a copy of the cache.
    written = functools.cache(lambda: _write(q, k, v, fused_kv, metadata, heads))
    refusals = []
    for implementation in (IMPLEMENTATIONS[name] for name in (AUTO_ORDER if impl == "auto" else (impl,))):
        try:
            if implementation.fuses_write:
                return implementation.attend(q, k, v, fused_kv, metadata, heads, options)
            result = implementation.attend(*written(), metadata, heads, options)
            return result._replace(out=heads.unscale(result.out).astype(q.dtype))
        except BackendUnsupported as refusal:
            if impl != "auto":
                raise
            refusals.append(str(refusal))
    raise BackendUnsupported("no implementation of attention can do this: " + "; ".join(refusals))


def _write(
    q: jax.Array, k: jax.Array, v: jax.Array, fused_kv: Buffer, metadata: AttentionMetadata, heads: HeadArrays
) -> tuple[jax.Array, jax.Array, jax.Array, Buffer]:
    """Scales q, k and v, and writes k and v: the first arguments of an implementation that does not fuse the write."""
    k, v = heads.scale_kv(k, v)
    q = heads.scale_queries(q)
    queries = rotate(q) if is_rotated(fused_kv) else q
    return queries, k, v, set_kv_buffer(fused_kv, jnp.asarray(metadata.out_cache_loc), k, v)


def _over_heads(
    run_part: Callable[..., AttentionResult], sharding: NamedSharding, operands: tuple[Any, ...]
) -> AttentionResult:
    """Runs over an Explicit mesh: each device attends the heads that it holds, as with ``MeshAttention``."""
    *_, fused_kv, _, heads = operands
    axis = split_of_heads("fused_kv", fused_kv)
    whole, by_head, rows = PartitionSpec(), PartitionSpec(axis), PartitionSpec(None, axis)
    specs = (rows, rows, rows, rows, whole, jax.tree.map(lambda array: by_head if array.ndim else whole, heads))
    # Unchecked, because kernels do not say over which axes their results vary.
    split = shard_over(run_part, sharding.mesh, in_specs=specs, out_specs=rows, check_vma=False)
    result: AttentionResult = split(*operands)
    return result
