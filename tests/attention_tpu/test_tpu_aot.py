"""Ahead-of-time compiles for real targets; they need libtpu, on Linux, and each runs in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from engine.bench.tpu_static import AOT_ENVIRONMENT, TOPOLOGIES, measure

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        sys.platform != "linux" or importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu on Linux: pip install -e .[tpu]",
    ),
]


THROUGH_THE_CALL = """
import sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding
from engine.attention.api import ragged_paged_attention

device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]


def like(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))


def step(cache, q, k, v, table, cu, lens):
    return ragged_paged_attention(
        q, k, v, cache, page_table=table, cu_q_lens=cu, kv_lens=lens, page_size=128, impl=sys.argv[2]
    )


bf16, i32 = jnp.bfloat16, jnp.int32
kv = like(bf16, 4, 2, 128)
args = (like(bf16, 9 * 128, 4, 128), like(bf16, 4, 8, 128), kv, kv, like(i32, 4, 2), like(i32, 5), like(i32, 4))
with jax.sharding.use_abstract_mesh(Mesh([device], ("x",)).abstract_mesh):
    compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
print("tpu_custom_call" in compiled.as_text())
"""


@pytest.mark.parametrize(
    ("gen", "impl"),
    [("v6e", "auto"), *(pytest.param(gen, "tpu", marks=pytest.mark.slow) for gen in ("v5e", "v7x"))],
)
def test_the_call_takes_the_kernel_where_it_is_lowered_for_a_tpu(gen: str, impl: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", THROUGH_THE_CALL, TOPOLOGIES[gen], impl],
        env=os.environ | AOT_ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "True"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn"])
@pytest.mark.parametrize("gen", ["v5e", "v6e", "v7x"])
@pytest.mark.parametrize("heads", [(32, 8), (8, 1)], ids=["llama-8b", "llama-70b-by-8"])
def test_compiles_with_temporaries_far_below_the_cache(gen: str, dtype: str, heads: tuple[int, int]) -> None:
    found = measure(gen, 128, q_heads=heads[0], heads=heads[1], dtype=dtype)
    assert found["alias_bytes"] == found["cache_bytes"]
    assert found["temp_bytes"] < found["cache_bytes"] / 20


@pytest.mark.slow
@pytest.mark.parametrize(("page_size", "most"), [(128, 1.5), (16, 1.7)])
def test_static_bars_on_v6e(page_size: int, most: float) -> None:
    found = measure("v6e", page_size)
    assert found["decode bundles a token, total with runs"] <= most
    assert found["prefill FLOPs a bundle"] >= 180_000
    # A tenth of 12,763 spills and 21,002 fills, the figures of tpu-inference's prefill loop.
    assert found["prefill hot loop spills"] <= 1276
    assert found["prefill hot loop fills"] <= 2100
