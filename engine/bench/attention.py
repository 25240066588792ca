"""Attention over the paged cache, compared with gathering every page before the softmax, and with torch.

The share of bandwidth is the bytes of context that the algorithm must read per second of its time, divided by the bytes
per second that a plain reduction of a large buffer reads on the same machine in the same rounds. Torch, where it is
installed (the extra ``hf``), runs its ``scaled_dot_product_attention`` on a contiguous cache, on the CPU. With
``--cache-dtypes``, the same step over narrow caches stands beside them.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from engine.attention import AttentionMetadata, FlashAttentionBackend
from engine.bench.plot_option import add_plot_option, require_matplotlib
from engine.bench.timing import Timings, median_ratio, print_table, time_in_turn
from engine.kv.layout import KVLayout, extract_k_from_fused_kv, extract_v_from_fused_kv
from engine.kv.narrow import Buffer, codes_of
from engine.kv.pool import TokenToKVPool
from engine.kv.scatter import set_kv_buffer
from engine.terminal import count

BANDWIDTH_BUFFER_BYTES = 256 << 20  # much larger than any cache of a CPU
CACHE_DTYPES = ("float8_e4m3fn", "int8", "int4")
DEFAULT_SIZES = {"decode": (32, 2048), "prefill": (1, 1024)}  # sequences, tokens of each


@dataclass(frozen=True)
class Problem:
    """A step to be timed; every sequence has ``context`` tokens, of which the last ``q_len`` are new."""

    batch: int
    context: int
    q_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str

    @property
    def columns(self) -> int:
        """Page-table entries per row."""
        return -(-self.context // self.page_size)

    def context_bytes(self, cache_dtype: str | None = None) -> int:
        """Bytes of K and V, scales included, to be read once from a cache of this dtype; None is the step's."""
        return self.batch * self.context * self.layout(cache_dtype or self.dtype).bytes_per_token

    def layout(self, dtype: str) -> KVLayout:
        """Layout of a cache of this dtype."""
        return KVLayout.create(
            head_num=self.kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
            page_size=self.page_size,
            platform=jax.default_backend(),
        )


@dataclass
class Step:
    """The arrays of a problem, on the device."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    fused_kv: Buffer
    metadata: AttentionMetadata


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--mode", choices=("decode", "prefill"), default="decode", help="1 new token each, or all new")
    parser.add_argument("--batch", type=count, help="sequences (default: 32; prefill: 1)")
    parser.add_argument("--context", type=count, help="tokens of each with the new ones (default: 2048; prefill: 1024)")
    parser.add_argument("--q-heads", type=count, default=32)
    parser.add_argument("--kv-heads", type=count, default=8)
    parser.add_argument("--head-dim", type=count, default=128)
    parser.add_argument("--page-size", type=count, default=16, help="tokens")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--cache-dtypes",
        nargs="*",
        choices=CACHE_DTYPES,
        default=(),
        metavar="DTYPE",
        help=f"also measure caches of these dtypes ({', '.join(CACHE_DTYPES)}), with tokens of --dtype",
    )
    parser.add_argument("--impl", default="auto", help="this package's: auto, xla, cpu, tpu or gpu")
    parser.add_argument("--rounds", type=count, default=9)
    add_plot_option(parser, "measure decode by context and by batch size and plot bandwidths")


def run(args: argparse.Namespace) -> None:
    """Prints a table of this package's attention, gather-then-softmax and torch.

    Raises:
        ConfigError: ``--plot`` is given and matplotlib is not installed.
    """
    require_matplotlib(args)
    batch, context = DEFAULT_SIZES[args.mode]
    batch, context = args.batch or batch, args.context or context
    sizes = (args.q_heads, args.kv_heads, args.head_dim, args.page_size, args.dtype)
    problem = Problem(batch, context, 1 if args.mode == "decode" else context, *sizes)
    timings, bandwidth = measure(problem, {"ours": args.impl}, args.rounds, args.cache_dtypes)
    rows = []
    for name, timing in timings.items():
        ratios = (median_ratio(timings[other], timing) for other in ("gather, softmax", "ours"))
        cache_dtype = name.removeprefix("ours, ") if name.startswith("ours, ") else None
        share = problem.context_bytes(cache_dtype) / timing.median / bandwidth
        rows.append([name, f"{timing.median * 1e3:.1f}", *(f"{ratio:.2f}x" for ratio in ratios), f"{share:.1%}"])
    print(
        f"{args.mode} {problem.batch} x {problem.context} tokens, {problem.q_heads} q / {problem.kv_heads} KV heads of "
        f"{problem.head_dim}, {problem.dtype}, page_size {problem.page_size}; jax {jax.__version__} on "
        f"{jax.default_backend()}; memory reads at {bandwidth / 1e9:.1f} GB/s"
    )
    print_table(["", "ms per call", "speed", "of ours", "of bandwidth"], rows)
    if args.plot:
        from engine.bench import attention_plot  # here, because it needs matplotlib

        attention_plot.draw(problem, args.impl, args.rounds, args.plot)


def measure(
    problem: Problem, ours: Mapping[str, str], rounds: int, cache_dtypes: Sequence[str] = ()
) -> tuple[dict[str, Timings], float]:
    """Times all contenders on one problem, in the same rounds.

    Args:
        problem: the step.
        ours: impl of each contender of this package, by name.
        rounds: measured rounds.
        cache_dtypes: other dtypes of the cache over which the first of ours is measured too, as "ours, <dtype>".

    Returns:
        The timings by name, of ours, of gather-then-softmax and of torch where it is installed; and the bytes per
        second of a plain read.
    """
    step = make_step(problem)
    contenders: dict[str, Callable[[], object]] = {}
    backends = []
    for name, impl in ours.items():
        backend = FlashAttentionBackend(
            page_size=problem.page_size,
            num_q_heads=problem.q_heads,
            num_kv_heads=problem.kv_heads,
            head_dim=problem.head_dim,
            impl=impl,
        )
        contenders[name] = in_place(backend, step)
        backends.append(backend)
    first = next(iter(contenders)) if contenders else None
    for dtype in cache_dtypes:
        contenders[f"{first}, {dtype}"] = in_place(
            backends[0], replace(step, fused_kv=narrowed(problem, codes_of(step.fused_kv), dtype))
        )
    contenders["gather, softmax"] = in_place(functools.partial(gather_then_softmax, problem), step)
    contenders |= {**_torch(problem), "read a buffer": _reader()}
    timings = time_in_turn(contenders, rounds=rounds)
    return timings, BANDWIDTH_BUFFER_BYTES / timings.pop("read a buffer").median


def make_step(problem: Problem) -> Step:
    """Random tensors, and page ids in random order."""
    pages = 1 + problem.batch * problem.columns
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = problem.batch * problem.q_len
    shapes = (
        (tokens, problem.q_heads, problem.head_dim),
        (tokens, problem.kv_heads, problem.head_dim),
        (tokens, problem.kv_heads, problem.head_dim),
        (pages * problem.page_size, 2 * problem.kv_heads, problem.head_dim),
    )
    q, k, v, fused_kv = (jax.random.normal(key, shape, problem.dtype) for key, shape in zip(keys, shapes, strict=True))
    table = 1 + np.random.default_rng(0).permutation(pages - 1).reshape(problem.batch, problem.columns)
    metadata = AttentionMetadata.build(
        table,
        np.arange(problem.batch + 1) * problem.q_len,
        np.full(problem.batch, problem.context),
        num_tokens=tokens,
        page_size=problem.page_size,
    )
    return Step(q, k, v, fused_kv, metadata.to_device())


def narrowed(problem: Problem, fused_kv: jax.Array, dtype: str) -> Buffer:
    """A cache's tokens in another dtype."""
    slots = problem.page_size * (1 + problem.batch * problem.columns)
    size = slots - problem.page_size
    pool = TokenToKVPool(size, problem.page_size, dtype, problem.kv_heads, problem.head_dim, layer_num=1)
    keys, values = extract_k_from_fused_kv(fused_kv), extract_v_from_fused_kv(fused_kv)
    pool.set_kv_buffer(0, jnp.arange(slots), keys, values)
    buffer: Buffer = pool.buffers[0]
    return buffer


def gather_then_softmax(
    problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array, fused_kv: jax.Array, metadata: AttentionMetadata
) -> tuple[jax.Array, ...]:
    """The plain algorithm: gathers every page of every sequence, then computes one softmax over all of it."""
    fused_kv = set_kv_buffer(fused_kv, jnp.asarray(metadata.out_cache_loc), k, v)
    pages = fused_kv.reshape(-1, problem.page_size, *fused_kv.shape[1:])
    context = pages[metadata.page_table].reshape(problem.batch, -1, *fused_kv.shape[1:])
    group = problem.q_heads // problem.kv_heads
    grouped = q.reshape(problem.batch, problem.q_len, problem.kv_heads, group, problem.head_dim)
    keys, values = extract_k_from_fused_kv(context), extract_v_from_fused_kv(context)
    logits = jnp.einsum("bqhgd,blhd->bhgql", grouped, keys, preferred_element_type=jnp.float32)
    positions = jnp.asarray(metadata.positions).reshape(problem.batch, 1, 1, problem.q_len, 1)
    visible = jnp.arange(context.shape[1]) <= positions
    weights = jax.nn.softmax(jnp.where(visible, logits * problem.head_dim**-0.5, -jnp.inf), axis=-1)
    out = jnp.einsum("bhgql,blhd->bqhgd", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype), fused_kv


def in_place(attend: Callable[..., tuple[jax.Array, ...]], step: Step) -> Callable[[], object]:
    """A call of ``attend`` that donates a copy of the cache and keeps the returned one, as an engine does."""
    compiled = jax.jit(attend, donate_argnums=3)
    cache = jax.tree.map(jnp.copy, step.fused_kv)

    def call() -> None:
        nonlocal cache
        out, cache = compiled(step.q, step.k, step.v, cache, step.metadata)
        out.block_until_ready()

    return call


def _torch(problem: Problem) -> dict[str, Callable[[], object]]:
    """Torch's attention for the same sizes with a contiguous cache, where torch is installed and jax runs on a CPU."""
    if importlib.util.find_spec("torch") is None or jax.default_backend() != "cpu":
        return {}
    import torch  # here, because the import takes seconds and is not always needed

    dtype = getattr(torch, problem.dtype)
    shapes = (
        (problem.batch, problem.q_heads, problem.q_len, problem.head_dim),
        (problem.batch, problem.kv_heads, problem.context, problem.head_dim),
        (problem.batch, problem.kv_heads, problem.context, problem.head_dim),
    )
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    causal = problem.q_len > 1  # its mask counts from the first token, so q_len must be 1 or all

    def call() -> None:
        with torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return {"torch, contiguous": call}


def _reader() -> Callable[[], object]:
    """Reads a large buffer once, on all cores."""
    buffer = jnp.ones((BANDWIDTH_BUFFER_BYTES // 4096, 1024), jnp.float32)
    total = jax.jit(lambda x: x.sum(-1))
    return lambda: total(buffer).block_until_ready()
