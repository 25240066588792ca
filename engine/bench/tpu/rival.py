"""tpu-inference's ragged paged attention kernel (v3), fetched from PyPI and compiled beside this package's.

It is installed without its dependencies into a cache directory of the user, never into the environment that runs. Its
package's ``__init__`` pulls in a serving engine, so the kernel's module is imported around it.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

from engine.bench.tpu.aot import TOPOLOGIES, fresh_dumps
from engine.bench.tpu.bundles import read_program
from engine.bench.tpu.figures import rival_figures
from engine.bench.tpu.hlo import kernel_vmem_bytes
from engine.errors import BackendUnsupported

REQUIREMENT = "tpu-inference==0.32.0"
KERNEL = "tpu_inference.kernels.ragged_paged_attention.v3.kernel"
VERSIONS = {"v5e": 5, "v6e": 6, "v7x": 7}  # what its get_tpu_version would say on each

_seen: set[Path] = set()


def install() -> Path:
    """Installs the rival once, and returns the directory that holds it.

    Raises:
        BackendUnsupported: pip cannot fetch it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "fused-kv-engine" / REQUIREMENT.replace("==", "-")
    if not (target / "tpu_inference").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        options = ["--ignore-requires-python", "--target", str(target), REQUIREMENT]
        done = subprocess.run([*pip, *options], capture_output=True, text=True)
        if done.returncode:
            raise BackendUnsupported(f"cannot fetch {REQUIREMENT} to compare with:\n{done.stderr[-1000:]}")
    return target


def compile_rival(
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
    site: str,
    shrink: int = 1,
    folder: str | None = None,
) -> dict[str, Any]:
    """Compiles the rival's call with its own default blocks.

    Args:
        gen: as in ``programs.compile_attention``, like all of the same name.
        page_size: likewise.
        q_heads: likewise.
        kv_heads: likewise.
        head_dim: likewise.
        dtype: likewise.
        tokens: likewise.
        batch: likewise.
        context: likewise.
        folder: likewise.
        site: the directory that ``install`` returned.
        shrink: divides its default prefill blocks, for a target whose VMEM does not hold them.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import Mesh, SingleDeviceSharding

    kernel = _import_kernel(Path(site), gen)
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[gen]).devices[0]
    wide = jnp.float32 if dtype == "float32" else jnp.bfloat16
    pages = -(-context // page_size)

    def like(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def blocks(case: Any) -> tuple[int, ...]:
        sizes = (q_heads, kv_heads, head_dim, page_size, tokens, batch, pages)
        chosen = kernel.get_default_block_sizes(wide, jnp.dtype(dtype), *sizes, case=case)
        return tuple(chosen[name] for name in ("bq_sz", "bkv_sz", "bq_csz", "bkv_csz"))

    decode_blocks = blocks(kernel.RpaCase.DECODE)
    queries, keys, fewer_queries, chunk = blocks(kernel.RpaCase.MIXED)
    queries, keys, fewer_queries = queries // shrink, max(keys // shrink, chunk), fewer_queries // shrink
    cache = like(kernel.get_kv_cache_shape(batch * pages + 1, page_size, kv_heads, head_dim, dtype), dtype)
    new = like((tokens, kv_heads, head_dim), dtype)
    mesh = Mesh([device], ("x",)).abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = kernel.ragged_paged_attention.lower(
            like((tokens, q_heads, head_dim), wide), new, new, cache,
            like((batch,)), like((batch * pages,)), like((batch + 1,)), like((3,)),
            sm_scale=head_dim**-0.5, d_block_sizes=decode_blocks, m_block_sizes=(queries, keys, fewer_queries, chunk),
        )  # fmt: skip
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    vmem = kernel_vmem_bytes(compiled.as_text() or "")
    found: dict[str, Any] = {
        "temporary bytes": memory.temp_size_in_bytes,
        "VMEM bytes": max(vmem.values()),
        "prefill blocks": [queries, keys, fewer_queries, chunk],
    }
    if folder:
        decode, prefill = fresh_dumps(Path(folder), "RPA", _seen)
        lanes = -(-head_dim // 128) * 128
        found |= rival_figures(
            *(read_program(path) for path in (decode, prefill)),
            decode_tokens=decode_blocks[1],
            prefill_flops=4 * lanes * queries * q_heads * chunk,
            chunks=keys // chunk,
        )
    return found


def _import_kernel(site: Path, gen: str) -> Any:
    package = types.ModuleType("tpu_inference")
    package.__path__ = [str(site / "tpu_inference")]
    sys.modules.setdefault("tpu_inference", package)
    kernel: Any = importlib.import_module(KERNEL)
    kernel.get_tpu_version = lambda: VERSIONS[gen]
    return kernel
