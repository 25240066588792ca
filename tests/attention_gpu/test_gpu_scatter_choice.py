"""When set_kv_buffer takes the Hopper kernel: by target and by rows, under vmap, in 64 bits and over a mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_cases import NEEDS_MOSAIC
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, PartitionSpec

from engine.kv import scatter
from engine.kv.pool import TokenToKVPool
from engine.kv.scatter import set_kv_buffer

pytestmark = NEEDS_MOSAIC

KERNEL, XLAS = "mosaic_gpu", "stablehlo.scatter"
HOPPER, OTHER = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


def shapes(*, heads: int = 2, head_dim: int = 128, dtype: str = "bfloat16", lanes: int = 0) -> tuple[Any, ...]:
    new = jax.ShapeDtypeStruct((5, heads, head_dim), dtype)
    buffer = jax.ShapeDtypeStruct((64, 2 * heads, lanes or head_dim), dtype)
    return buffer, jax.ShapeDtypeStruct((5,), jnp.int32), new, new


def lowered(write: Callable[..., Any], *arguments: Any, kind: str = HOPPER, platform: str = "cuda") -> str:
    """The program for ``platform``, traced for a device of ``kind``."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        return str(jax.jit(write).trace(*arguments).lower(lowering_platforms=(platform,)).as_text())


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process whose first device is one: a mesh of this CPU's names another device."""
    monkeypatch.setattr(scatter, "not_hopper", lambda: None)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("rows", "taken"),
    [
        ({}, True),
        ({"head_dim": 80}, True),
        ({"head_dim": 64, "heads": 1, "dtype": "float8_e4m3fn"}, True),
        ({"head_dim": 256, "dtype": "float32"}, True),
        ({"head_dim": 4}, False),
        ({"head_dim": 512}, False),
        ({"head_dim": 80, "lanes": 128}, False),
    ],
    ids=str,
)
def test_a_lowering_for_a_hopper_takes_the_kernel_for_rows_that_fit(rows: dict[str, Any], taken: bool) -> None:
    program = lowered(set_kv_buffer, *shapes(**rows))
    assert (KERNEL in program, XLAS in program) == (taken, not taken)


def test_no_other_lowering_takes_it() -> None:
    assert KERNEL not in lowered(set_kv_buffer, *shapes(), kind=OTHER)
    assert KERNEL not in lowered(set_kv_buffer, *shapes(), platform="cpu")
    assert KERNEL not in lowered(set_kv_buffer, *shapes(), platform="tpu")


def test_it_is_taken_in_64_bits_and_under_vmap() -> None:
    batched = jax.tree.map(lambda shape: jax.ShapeDtypeStruct((3, *shape.shape), shape.dtype), shapes())
    assert KERNEL in lowered(jax.vmap(set_kv_buffer), *batched)
    with jax.enable_x64(True):
        assert KERNEL in lowered(set_kv_buffer, *shapes())


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("checked", [False, True])
def test_within_shard_map_it_is_taken_where_the_types_do_not_vary(checked: bool) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("heads",))
    heads, slots = PartitionSpec(None, "heads"), PartitionSpec()
    write = jax.shard_map(
        set_kv_buffer, mesh=mesh, in_specs=(heads, slots, heads, heads), out_specs=heads, check_vma=checked
    )
    program = str(jax.jit(write).trace(*shapes()).lower(lowering_platforms=("cuda",)).as_text())
    assert (KERNEL in program, XLAS in program) == (not checked, checked)


@pytest.mark.usefixtures("on_hopper")
def test_a_pool_over_a_mesh_takes_it() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "context", "tensor"))
    pool = TokenToKVPool(size=48, page_size=16, dtype="bfloat16", head_num=2, head_dim=128, layer_num=1, mesh=mesh)

    def write(pool: TokenToKVPool, loc: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        pool.set_kv_buffer(0, loc, k, v)
        return pool.get_fused_kv_buffer(0)

    program = str(jax.jit(write).trace(pool, *shapes()[1:]).lower(lowering_platforms=("cuda",)).as_text())
    assert KERNEL in program


@pytest.mark.usefixtures("on_hopper")
def test_on_several_gpus_a_cache_that_may_be_split_is_left_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter, "may_be_split", lambda: True)
    program = str(jax.jit(set_kv_buffer).trace(*shapes()).lower(lowering_platforms=("cuda",)).as_text())
    assert XLAS in program
    assert KERNEL not in program
