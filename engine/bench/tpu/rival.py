"""tpu-inference's ragged paged attention kernel (v3), fetched from PyPI and compiled for comparison.

It is installed without its dependencies into a cache directory of the user, never into the running environment. The
``__init__`` of its package imports a serving engine, so the kernel's module is imported without it.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

from engine.bench.tpu.aot import TOPOLOGIES, fresh_dumps
from engine.bench.tpu.bundles import read_program
from engine.bench.tpu.figures import rival_figures
from engine.bench.tpu.hlo import kernel_vmem_bytes
from engine.errors import BackendUnsupported
from engine.user_files import cache_directory

REQUIREMENT = "tpu-inference==0.32.0"
KERNEL = "tpu_inference.kernels.ragged_paged_attention.v3.kernel"
VERSIONS = {"v5e": 5, "v6e": 6, "v7x": 7}  # what its get_tpu_version returns on each generation

_seen: set[Path] = set()


def install() -> Path:
    """Installs the rival once, and returns the directory that holds it.

    Raises:
        BackendUnsupported: pip cannot fetch it.
    """
    target = cache_directory() / REQUIREMENT.replace("==", "-")
    if not (target / "tpu_inference").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        options = ["--ignore-requires-python", "--target", str(target), REQUIREMENT]
        done = subprocess.run([*pip, *options], capture_output=True, text=True)
        if done.returncode:
            raise BackendUnsupported(f"cannot fetch {REQUIREMENT} to compare with:\n{done.stderr[-1000:]}")
    return target


class Shape(NamedTuple):
    """The shape that is compiled: the arguments of ``programs.compile_attention``."""

    gen: str
    page_size: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    tokens: int
    batch: int
    context: int

    @property
    def pages(self) -> int:
        """Pages of a sequence."""
        return -(-self.context // self.page_size)

    @property
    def query_dtype(self) -> str:
        """float32 for a float32 cache, else bfloat16."""
        return "float32" if self.dtype == "float32" else "bfloat16"


class Blocks(NamedTuple):
    """The rival's block sizes, in the order of its call."""

    queries: int
    keys: int
    computed_queries: int
    computed_keys: int

    def shrunk(self, by: int) -> Blocks:
        """Smaller block sizes, which compute as many keys at once as before."""
        keys = max(self.keys // by, self.computed_keys)
        return Blocks(self.queries // by, keys, self.computed_queries // by, self.computed_keys)


def compile_rival(*, site: str, shrink: int = 1, folder: str | None = None, **shape: Any) -> dict[str, Any]:
    """Compiles the rival's call with its own default blocks.

    Args:
        site: the directory that ``install`` returned.
        shrink: divides its default prefill blocks, for a target whose VMEM does not hold them.
        folder: directory where libtpu dumps bundles, to count them; None: no count.
        shape: the fields of ``Shape``.

    Returns:
        Bytes of temporaries and VMEM, the prefill blocks, and the counts of ``rival_figures``.
    """
    one = Shape(**shape)
    kernel = _import_kernel(Path(site), one.gen)
    decode = _default_blocks(kernel, one, kernel.RpaCase.DECODE)
    prefill = _default_blocks(kernel, one, kernel.RpaCase.MIXED).shrunk(shrink)
    compiled = _lower(kernel, one, decode, prefill).compile()
    memory: Any = compiled.memory_analysis()
    found: dict[str, Any] = {
        "temporary bytes": memory.temp_size_in_bytes,
        "VMEM bytes": max(kernel_vmem_bytes(compiled.as_text() or "").values()),
        "prefill blocks": list(prefill),
    }
    if folder:
        programs = fresh_dumps(Path(folder), "RPA", _seen)
        lanes = -(-one.head_dim // 128) * 128
        found |= rival_figures(
            *(read_program(path) for path in programs),
            decode_tokens=decode.keys,
            prefill_flops=4 * lanes * prefill.queries * one.q_heads * prefill.computed_keys,
            chunks=prefill.keys // prefill.computed_keys,
        )
    return found


def _default_blocks(kernel: Any, one: Shape, case: Any) -> Blocks:
    import jax.numpy as jnp

    sizes = (one.q_heads, one.kv_heads, one.head_dim, one.page_size, one.tokens, one.batch, one.pages)
    chosen = kernel.get_default_block_sizes(jnp.dtype(one.query_dtype), jnp.dtype(one.dtype), *sizes, case=case)
    return Blocks(*(chosen[name] for name in ("bq_sz", "bkv_sz", "bq_csz", "bkv_csz")))


def _lower(kernel: Any, one: Shape, decode: Blocks, prefill: Blocks) -> Any:
    """The rival's call over a cache that holds the whole batch, lowered for the target."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import Mesh, SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[one.gen]).devices[0]

    def like(shape: tuple[int, ...], dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    pages = one.batch * one.pages
    cache = kernel.get_kv_cache_shape(pages + 1, one.page_size, one.kv_heads, one.head_dim, one.dtype)
    new = like((one.tokens, one.kv_heads, one.head_dim), one.dtype)
    with jax.sharding.use_abstract_mesh(Mesh([device], ("x",)).abstract_mesh):
        return kernel.ragged_paged_attention.lower(
            like((one.tokens, one.q_heads, one.head_dim), one.query_dtype), new, new, like(cache, one.dtype),
            like((one.batch,)), like((pages,)), like((one.batch + 1,)), like((3,)),
            sm_scale=one.head_dim**-0.5, d_block_sizes=tuple(decode), m_block_sizes=tuple(prefill),
        )  # fmt: skip


def _import_kernel(site: Path, gen: str) -> Any:
    package = types.ModuleType("tpu_inference")
    package.__path__ = [str(site / "tpu_inference")]
    sys.modules.setdefault("tpu_inference", package)
    kernel: Any = importlib.import_module(KERNEL)
    kernel.get_tpu_version = lambda: VERSIONS[gen]
    return kernel
