"""Attention of this package, compiled for a TPU that need not be present."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from engine.attention import ragged_paged_attention
from engine.attention.impl.tpu.tpu_step import make_geometry
from engine.attention.options import AttentionOptions
from engine.bench.tpu.aot import TOPOLOGIES, fresh_dumps
from engine.bench.tpu.bundles import read_program
from engine.bench.tpu.figures import our_figures
from engine.bench.tpu.hlo import kernel_vmem_bytes, launches, moves_of_at_least
from engine.bench.tpu.whole_call import Sequences, call_figures
from engine.kv.layout import KVLayout
from engine.kv.scatter import set_kv_buffer

_seen: set[Path] = set()


def _query_dtype(dtype: str) -> Any:
    return jnp.float32 if dtype == "float32" else jnp.bfloat16


def compile_attention(
    *,
    gen: str,
    page_size: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    tokens: int,
    batch: int,
    context: int,
    window: int | None = None,
    extras: bool = False,
    folder: str | None = None,
) -> dict[str, Any]:
    """Compiles one call of ``ragged_paged_attention`` over a donated cache that holds the whole batch.

    Args:
        gen: target, a key of ``TOPOLOGIES``.
        page_size: tokens per page.
        q_heads: query heads.
        kv_heads: KV heads.
        head_dim: elements per head.
        dtype: dtype of the cache. Queries are float32 for a float32 cache, else bfloat16. An 8-bit cache has scales, as
            arguments.
        tokens: new tokens of the step, T.
        batch: sequences, B.
        context: longest context in tokens.
        window: sliding window in tokens, or None.
        extras: whether the call has sinks, a soft cap and the log-sum-exp.
        folder: directory where libtpu dumps bundles, to count them; None: no count.

    Returns:
        Bytes of cache, queries, temporaries, alias and VMEM; instructions that move an array of the cache's size, or
        make one of at least a quarter of the queries; how many programs run around the kernel; and the counts of
        ``our_figures``, and of ``call_figures`` for a step of the whole batch.
    """
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[gen]).devices[0]
    layout = KVLayout.create(head_num=kv_heads, head_dim=head_dim, dtype=dtype, page_size=page_size, platform="tpu")
    pages = -(-context // page_size)
    slots = (batch * pages + 1) * page_size

    def like(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def step(cache: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, rest: dict[str, Any]) -> tuple[jax.Array, ...]:
        options: dict[str, Any] = {"soft_cap": 30.0, "return_lse": True} if extras else {}
        return ragged_paged_attention(
            q, k, v, cache, page_size=page_size, sliding_window=window, impl="tpu", **options, **rest
        )

    cache = like(layout.buffer_shape(slots), jnp.dtype(dtype))
    queries = like((tokens, q_heads, head_dim), _query_dtype(dtype))
    new = like((tokens, kv_heads, head_dim), _query_dtype(dtype))
    rest = {
        "page_table": like((batch, pages), jnp.int32),
        "cu_q_lens": like((batch + 1,), jnp.int32),
        "kv_lens": like((batch,), jnp.int32),
    }
    if layout.dtype.itemsize == 1:
        rest |= {name: like((kv_heads,), jnp.float32) for name in ("k_scale", "v_scale")}
    if extras:
        rest["sinks"] = like((q_heads,), jnp.float32)
    with jax.sharding.use_abstract_mesh(Mesh([device], ("x",)).abstract_mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(cache, queries, new, new, rest)
    compiled = lowered.compile()
    found = _footprint(compiled, layout.bytes_per_token * slots)
    text = compiled.as_text() or ""
    found["VMEM bytes"] = max(kernel_vmem_bytes(text).values())
    found["query bytes"] = math.prod(queries.shape) * queries.dtype.itemsize
    found["query moves"] = moves_of_at_least(text, found["query bytes"] // 4)
    found["programs around the kernel"] = launches(text) - 1
    if folder:
        (dump,) = fresh_dumps(Path(folder), "ragged_paged_attention", _seen)
        layer = AttentionOptions(page_size, head_dim**-0.5, window)
        geo = make_geometry(queries, kv_heads, cache, layer, (batch, pages), generation=gen)
        program = read_program(dump)
        found |= our_figures(program, geo)
        found |= call_figures(gen, program, geo, Sequences(min(batch, tokens), max(tokens // batch, 1), context))
    return found


def compile_scatter(
    *, gen: str, page_size: int, kv_heads: int, head_dim: int, dtype: str, tokens: int, slots: int
) -> dict[str, Any]:
    """Compiles one ``set_kv_buffer`` of ``tokens`` into a donated cache of ``slots``; arguments as for attention.

    Returns:
        Bytes of cache, temporaries and alias; instructions that move an array of the cache's size; and whether the
        program has the kernel.
    """
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[gen]).devices[0]
    layout = KVLayout.create(head_num=kv_heads, head_dim=head_dim, dtype=dtype, page_size=page_size, platform="tpu")

    def like(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    new = like((tokens, kv_heads, head_dim), _query_dtype(dtype))
    arguments = like(layout.buffer_shape(slots), jnp.dtype(dtype)), like((tokens,), jnp.int32), new, new
    compiled = jax.jit(set_kv_buffer, donate_argnums=0).lower(*arguments).compile()
    found = _footprint(compiled, layout.bytes_per_token * slots)
    return found | {"kernel": "tpu_custom_call" in (compiled.as_text() or "")}


def _footprint(compiled: Any, cache_bytes: int) -> dict[str, Any]:
    """Memory of a compiled program over a donated cache, and what it moves, in bytes."""
    memory = compiled.memory_analysis()
    return {
        "cache bytes": cache_bytes,
        "temporary bytes": memory.temp_size_in_bytes,
        "alias bytes": memory.alias_size_in_bytes,
        "moves": moves_of_at_least(compiled.as_text() or "", cache_bytes // 2),
    }
