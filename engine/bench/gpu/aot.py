"""Compiles for a Hopper GPU in a separate process, on a machine that has none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from engine.bench.compiling import compile_cases
from engine.bench.gpu.toolchain import SITE, require_compiler

# The properties of a device that XLA needs to compile for it, from the data sheets.
_COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49_152,
    "shared_memory_per_core": 233_472,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2_147_483_647,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "clock_rate_ghz": 1.98,
    "shared_memory_per_block_optin": 232_448,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
}
TARGETS: dict[str, tuple[str, dict[str, float]]] = {
    "h100": (
        "NVIDIA H100 80GB HBM3",
        {"memory_bandwidth": 3_352_320_000_000, "l2_cache_size": 52_428_800, "device_memory_size": 84_978_434_048},
    ),
    "h200": (
        "NVIDIA H200",
        {"memory_bandwidth": 4_916_736_000_000, "l2_cache_size": 62_914_560, "device_memory_size": 150_121_545_728},
    ),
}


def compile_each(target: str, cases: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Calls ``target`` once per case, all in one separate process, and yields each result when it arrives.

    Args:
        target: "module:function"; takes keyword arguments and returns a dict, both of JSON's types. Mosaic writes
            what it makes of the kernels to the folder that ``MOSAIC_GPU_DUMP_TO`` names.
        cases: the keyword arguments of each call.

    Yields:
        The function's dict, or ``{"failed": message}`` where it raised.

    Raises:
        BackendUnsupported: the compiler is not installed, or the process died.
    """
    require_compiler()
    with tempfile.TemporaryDirectory() as folder:
        environment = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": folder}
        yield from compile_cases(target, cases, site=SITE, environment=environment)


def hopper_devices(name: str, count: int = 1) -> list[Any]:
    """Devices to lower for, described as jax describes real ones; ``name`` is a key of ``TARGETS``."""
    from jax.experimental import topologies
    from jax.experimental.pallas import mosaic_gpu  # noqa: F401  (at import it sets the variable below to the path that it finds)

    os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(SITE / "nvidia" / "cu13")  # directory of the disassembler
    kind, more = TARGETS[name]
    values = "\n".join(f"  {key}: {value}" for key, value in (_COMMON | more).items())
    config = (
        f"gpu_device_info {{\n{values}\n  cuda_compute_capability {{ major: 9 }}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 }\nruntime_version { major: 13 }\n'
        f'device_description_str: "{kind}"\n'
    )
    topology = f"1x1x{count}"
    return list(topologies.get_topology_desc(platform="cuda", target_config=config, topology=topology).devices)
