"""Attention of this package, and jax's own, compiled for a GPU that need not be present."""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from engine.attention import ragged_paged_attention
from engine.bench.gpu.aot import hopper_devices
from engine.bench.gpu.figures import decode_figures, footprint, prefill_figures
from engine.bench.gpu.sass import Kernel, read_kernel
from engine.distributed.mesh import make_mesh
from engine.kv.scatter import set_kv_buffer

_seen: set[Path] = set()


def fresh_kernels() -> list[Kernel]:
    """The kernels that were compiled since the last call of this function, by name."""
    found = set(Path(os.environ["MOSAIC_GPU_DUMP_TO"]).glob("*.sass_ctrl")) - _seen
    _seen.update(found)
    return sorted((read_kernel(path) for path in found), key=lambda kernel: kernel.name)


class _Target:
    """A device for which programs are lowered."""

    def __init__(self, name: str) -> None:
        (self.device,) = hopper_devices(name)

    def like(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(self.device))

    def compile(self, function: Any, *arguments: Any) -> Any:
        """Compiles for the device; the first argument is donated."""
        fresh_kernels()
        with jax.sharding.use_abstract_mesh(Mesh(np.array([self.device]), ("x",)).abstract_mesh):
            return jax.jit(function, donate_argnums=0).lower(*arguments).compile()


def compile_attention(
    *,
    target: str,
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
) -> dict[str, Any]:
    """Compiles one call of ``ragged_paged_attention`` over a donated cache that holds the whole batch.

    Args:
        target: a key of ``TARGETS``.
        page_size: tokens per page.
        q_heads: query heads.
        kv_heads: KV heads.
        head_dim: elements per head.
        dtype: dtype of queries and cache.
        tokens: new tokens of the step, T.
        batch: sequences, B.
        context: longest context in tokens.
        window: sliding window in tokens, or None.
        extras: whether the call has sinks, a soft cap, scales and the log-sum-exp.

    Returns:
        Bytes of cache, temporaries and alias; instructions that move an array of the cache's size; the resources of
        each kernel; and the cost of its loops.
    """
    at = _Target(target)
    pages = -(-context // page_size)
    slots = (batch * pages + 1) * page_size

    def step(cache: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, rest: dict[str, Any]) -> tuple[jax.Array, ...]:
        options: dict[str, Any] = {"soft_cap": 30.0, "return_lse": True} if extras else {}
        return ragged_paged_attention(
            q, k, v, cache, page_size=page_size, sliding_window=window, impl="gpu", **options, **rest
        )

    new = at.like((tokens, kv_heads, head_dim), dtype)
    rest = {
        "page_table": at.like((batch, pages), jnp.int32),
        "cu_q_lens": at.like((batch + 1,), jnp.int32),
        "kv_lens": at.like((batch,), jnp.int32),
    }
    if extras:
        rest |= {name: at.like((kv_heads,), jnp.float32) for name in ("k_scale", "v_scale")}
        rest["sinks"] = at.like((q_heads,), jnp.float32)
    cache, queries = at.like((slots, 2 * kv_heads, head_dim), dtype), at.like((tokens, q_heads, head_dim), dtype)
    compiled = at.compile(step, cache, queries, new, new, rest)
    kernels = {kernel.name: kernel for kernel in fresh_kernels()}
    found = footprint(compiled, slots * 2 * kv_heads * head_dim * cache.dtype.itemsize, kernels.values())
    group = q_heads // kv_heads
    found |= decode_figures(kernels["decode_chunks"], group=group, head_dim=head_dim)
    return found | prefill_figures(kernels["prefill_tiles"])


def compile_scatter(
    *, target: str, kv_heads: int, head_dim: int, dtype: str, tokens: int, slots: int
) -> dict[str, Any]:
    """Compiles one ``set_kv_buffer`` of ``tokens`` into a donated cache of ``slots``; the rest as for attention.

    Returns:
        Bytes of cache, temporaries and alias; instructions that move an array of the cache's size; and the resources of
        each kernel.
    """
    at = _Target(target)
    new = at.like((tokens, kv_heads, head_dim), dtype)
    cache = at.like((slots, 2 * kv_heads, head_dim), dtype)
    compiled = at.compile(set_kv_buffer, cache, at.like((tokens,), jnp.int32), new, new)
    return footprint(compiled, slots * 2 * kv_heads * head_dim * cache.dtype.itemsize, fresh_kernels())


def compile_step(*, target: str, tp: int = 1, **sizes: Any) -> dict[str, Any]:
    """Compiles the serving runner's step of a Llama for ``tp`` GPUs; ``sizes`` are those of ``compile_step_on``.

    Returns:
        The results of ``compile_step_on``, and the names of the kernels that were compiled for it.
    """
    from engine.bench.tpu.step import compile_step_on

    fresh_kernels()
    devices = hopper_devices(target, tp)
    found = compile_step_on(devices, make_mesh(tp=tp, devices=devices), "gpu", **sizes)
    return found | {"kernels": [kernel.name for kernel in fresh_kernels()]}


def compile_yardstick(*, target: str, q_heads: int, kv_heads: int, head_dim: int, tokens: int) -> dict[str, Any]:
    """Compiles jax's own FlashAttention-3 for Mosaic GPU: causal, one dense sequence in float16.

    Returns:
        The resources of the kernel and the cost of its loops.
    """
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    at = _Target(target)
    # The kernel asks for the CUDA version, to work around a bug of one version; here there is no CUDA.
    attention_mgpu.cuda_versions = types.SimpleNamespace(cuda_runtime_get_version=lambda: 13_000)
    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    q, k = (at.like((1, tokens, heads, head_dim), jnp.float16) for heads in (q_heads, kv_heads))
    compiled = at.compile(lambda q, k, v: attention_mgpu.attention(q, k, v, config), q, k, k)
    (kernel,) = fresh_kernels()
    return footprint(compiled, 0, [kernel]) | prefill_figures(kernel)
