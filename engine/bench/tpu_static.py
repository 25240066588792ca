"""Static figures of the TPU kernel, from the bundles that libtpu compiles with no TPU at hand.

Predicated code counts as executed and stalls are not seen: read the figures beside the bytes-over-bandwidth floor.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
SLOTS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|\d+)\s+((?:[A-Z]{2}\s*,?\s*)*):\s*((?:>\s*)*)\{")
DUMP_FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final.*"
)
# What libtpu must find before jax is imported, to compile where no TPU is.
AOT_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}
CONTEXT = 4096


@dataclass(frozen=True)
class Loop:
    """A loop of the compiled program: its bundles, how deep it is nested, and what its slots hold."""

    first: int
    last: int
    depth: int
    slots: dict[str, int]

    @property
    def bundles(self) -> int:
        """Bundles from the first to the last, nested loops included once."""
        return self.last - self.first


def read_loops(folder: Path, program: str) -> tuple[list[Loop], dict[str, int]]:
    """Loops of a dumped program in order, and the slot use of the whole."""
    path = max(
        (f for f in folder.glob(f"*{program}*final_bundles.txt") if "schedule" not in f.name),
        key=lambda f: f.stat().st_size,
    )
    table = next(folder.glob(path.name.rsplit("-", 2)[0] + "-*utilization.txt")).read_text().split("== UTILIZATION:\n")
    use = [[int(x) for x in line.split()] for line in table[1].splitlines() if line.strip()]
    marks = [
        ("LB" in match[2], match[3].count(">")) for match in map(BUNDLE.match, path.read_text().splitlines()) if match
    ]

    def slots(first: int, last: int) -> dict[str, int]:
        return {name: sum(row[i] for row in use[first:last]) for i, name in enumerate(SLOTS)}

    loops = []
    for first, (begins, depth) in enumerate(marks):
        if begins:
            last = first + 1
            for index in range(first + 1, len(marks)):
                if marks[index][0] and marks[index][1] <= depth:
                    break
                if marks[index][1] >= depth:
                    last = index + 1
            loops.append(Loop(first, last, depth, slots(first, last)))
    return loops, slots(0, len(marks))


def inside(loops: list[Loop], outer: Loop) -> list[Loop]:
    """Loops directly inside another."""
    return [
        loop for loop in loops if loop.depth == outer.depth + 1 and outer.first < loop.first and loop.last <= outer.last
    ]


def figures(loops: list[Loop], total: dict[str, int], shape: dict[str, int]) -> dict[str, float]:
    """Bundles a token and FLOPs a bundle of the hot loops, with what they spill.

    The block loops of decode and prefill are those two levels deep that hold matrix work: in each, the first loop
    fetches, the next computes whole chunks and the last the edges.
    """
    blocks = [loop for loop in loops if loop.depth == 2 and loop.slots["MXU"]]
    decode, prefill = (next(loop for loop in blocks if inside(loops, loop)), blocks[-1])
    fetch, whole, edge = inside(loops, decode)
    run_tokens = shape["run_pages"] * shape["page_size"]
    nested = sorted((loop.bundles for loop in inside(loops, fetch)), reverse=True)
    run = fetch.bundles - sum(nested)
    scattered = run + (nested[0] if nested else 0)
    step = (decode.bundles - fetch.bundles - whole.bundles - edge.bundles) / shape["decode_fetch_tokens"]
    compute = whole.bundles / shape["decode_chunk_tokens"]
    chunk = inside(loops, prefill)[1]
    head = next(iter(inside(loops, chunk)), chunk)  # one head makes no loop
    flops = 4 * shape["lanes"] * shape["prefill_rows"] * shape["prefill_chunk_tokens"]
    return {
        "decode bundles a token, compute": compute,
        "decode bundles a token, DMA of runs": run / run_tokens,
        "decode bundles a token, DMA of scattered pages": scattered / run_tokens,
        "decode bundles a token, total with runs": compute + step + run / run_tokens,
        "decode bundles a token, total scattered": compute + step + scattered / run_tokens,
        "decode hot loop spills": whole.slots["SPILL"],
        "decode hot loop fills": whole.slots["FILL"],
        "prefill FLOPs a bundle": flops / head.bundles,
        "prefill hot loop MXU slots a bundle": head.slots["MXU"] / head.bundles,
        "prefill hot loop VALU slots a bundle": head.slots["VALU"] / head.bundles,
        "prefill hot loop spills": head.slots["SPILL"],
        "prefill hot loop fills": head.slots["FILL"],
        "program spills": total["SPILL"],
        "program fills": total["FILL"],
    }


def compile_here(gen: str, page_size: int, q_heads: int, heads: int, head_dim: int, dtype: str) -> dict[str, int]:
    """Compiles one step of 32 decode sequences; the environment must name libtpu's dump before jax is imported."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import Mesh, SingleDeviceSharding

    from engine.attention.api import ragged_paged_attention
    from engine.attention.spec import AttentionSpec
    from engine.attention.tpu.api import make_geometry
    from engine.kv.layout import KVLayout

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[gen]).devices[0]
    batch, pages = 32, CONTEXT // page_size
    layout = KVLayout.create(head_num=heads, head_dim=head_dim, dtype=dtype, page_size=page_size, platform="tpu")
    slots = (batch * pages + 1) * page_size

    def like(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def step(cache, q, k, v, table, cu, lens):  # type: ignore[no-untyped-def]
        return ragged_paged_attention(
            q, k, v, cache, page_table=table, cu_q_lens=cu, kv_lens=lens, page_size=page_size, impl="tpu"
        )

    wide = jnp.float32 if dtype == "float32" else jnp.bfloat16
    args = (
        like(layout.buffer_shape(slots), dtype),
        like((batch, q_heads, head_dim), wide),
        like((batch, heads, head_dim), wide),
        like((batch, heads, head_dim), wide),
        like((batch, pages), jnp.int32),
        like((batch + 1,), jnp.int32),
        like((batch,), jnp.int32),
    )
    with jax.sharding.use_abstract_mesh(Mesh([device], ("x",)).abstract_mesh):
        compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
    memory: Any = compiled.memory_analysis()
    spec = AttentionSpec(page_size, head_dim**-0.5)
    geo = make_geometry(args[1], heads, args[0], spec, pages, generation=gen)
    blocks = geo.blocks
    return {
        "run_pages": geo.run_pages,
        "page_size": page_size,
        "lanes": layout.lanes,
        "decode_fetch_tokens": blocks.decode_fetch_pages * page_size,
        "decode_chunk_tokens": blocks.decode_chunk_pages * page_size,
        "prefill_rows": blocks.prefill_queries * (q_heads // heads),
        "prefill_chunk_tokens": blocks.prefill_chunk_pages * page_size,
        "cache_bytes": layout.bytes_per_token * slots,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
    }


def measure(
    gen: str, page_size: int, *, q_heads: int = 32, heads: int = 8, head_dim: int = 128, dtype: str = "bfloat16"
) -> dict[str, float]:
    """Compiles in a process of its own and returns sizes and figures; needs libtpu on Linux."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | AOT_ENVIRONMENT | {"LIBTPU_INIT_ARGS": DUMP_FLAGS.format(folder)}
        code = f"import json; from engine.bench.tpu_static import compile_here as c; print(json.dumps(c({gen!r}, " \
            f"{page_size}, {q_heads}, {heads}, {head_dim}, {dtype!r})))"  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"compiling for {gen} failed:\n{done.stderr[-2000:]}")
        shape: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        found: dict[str, float] = figures(*read_loops(Path(folder), "ragged_paged_attention"), shape)
        return dict(shape) | found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("--gen", choices=TOPOLOGIES, default="v6e")
    parser.add_argument("--page", type=int, default=128)


def run(args: argparse.Namespace) -> None:
    """Prints one figure a line."""
    for name, value in measure(args.gen, args.page).items():
        print(f"{name:48} {value:>14,.3f}" if value < 100 else f"{name:48} {value:>14,.0f}")
