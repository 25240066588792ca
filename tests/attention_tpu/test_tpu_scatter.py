"""The TPU's scatter: in the interpreter bit for bit, and that a lowering for a TPU takes it, within shard_map too."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from engine.kv.layout import KVLayout
from engine.kv.scatter import last_of_equal, scatter_xla, set_kv_buffer
from engine.kv.scatter_tpu import scatter_tpu


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim"),
    [
        (jnp.bfloat16, 2, 128),
        (jnp.float32, 3, 80),
        (jnp.float8_e4m3fn, 1, 64),
        (jnp.bfloat16, 8, 256),
        (jnp.float32, 4, 256),
    ],
)
def test_rows_land_in_their_slots_and_dropped_ones_nowhere(dtype: jnp.dtype, heads: int, head_dim: int) -> None:
    rng = np.random.default_rng()
    layout = KVLayout.create(head_num=heads, head_dim=head_dim, dtype=dtype, page_size=8, platform="tpu")
    fused = rng.standard_normal(layout.buffer_shape(40)).astype(dtype)
    k, v = (rng.standard_normal((9, heads, head_dim)).astype(dtype) for _ in range(2))
    loc = np.array([3, -1, 39, 40, 0, -2, 17, 3, 17], np.int32)
    want = fused.copy()
    for token, slot in enumerate(loc):
        if 0 <= slot < 40:
            want[slot] = 0
            want[slot, 0 : 2 * heads : 2, :head_dim] = k[token]
            want[slot, 1 : 2 * heads : 2, :head_dim] = v[token]
    slots, tokens = last_of_equal(jnp.asarray(loc))
    try:
        found = jax.jit(functools.partial(scatter_tpu, interpret=pltpu.InterpretParams(detect_races=True)))(
            fused, slots, tokens, k, v
        )
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), want.view(np.uint8))
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    xla = scatter_xla(*(jnp.asarray(x) for x in (fused, np.where((loc < 0) | (loc >= 40), -1, loc), k, v)))
    np.testing.assert_array_equal(np.asarray(xla).view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_no_tokens_leave_the_buffer_as_it_is(dtype: jnp.dtype) -> None:
    fused = jnp.ones((16, 4, 128), dtype)
    none = jnp.zeros((0, 2, 128), dtype)
    found = set_kv_buffer(fused, jnp.zeros(0, jnp.int32), none, none)
    np.testing.assert_array_equal(np.asarray(found).view(np.uint8), np.asarray(fused).view(np.uint8))


SHAPES = (
    jax.ShapeDtypeStruct((64, 4, 128), jnp.bfloat16),
    jax.ShapeDtypeStruct((5,), jnp.int32),
    jax.ShapeDtypeStruct((5, 2, 128), jnp.bfloat16),
    jax.ShapeDtypeStruct((5, 2, 128), jnp.bfloat16),
)


def lowered_for(platform: str, write: object, *shapes: jax.ShapeDtypeStruct) -> str:
    return jax.jit(write).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()  # type: ignore[attr-defined]


def test_a_lowering_for_a_tpu_takes_the_dma_kernel_and_no_other_does() -> None:
    on_tpu = lowered_for("tpu", set_kv_buffer, *SHAPES)
    assert "tpu_custom_call" in on_tpu
    assert "stablehlo.scatter" not in on_tpu
    assert "tpu_custom_call" not in lowered_for("cpu", set_kv_buffer, *SHAPES)
    on_gpu = lowered_for("cuda", set_kv_buffer, *SHAPES)
    assert "tpu_custom_call" not in on_gpu
    assert "stablehlo.scatter" in on_gpu


def test_a_buffer_that_is_not_padded_for_a_tpu_keeps_xlas_scatter() -> None:
    narrow = (
        jax.ShapeDtypeStruct((64, 6, 128), jnp.bfloat16),
        SHAPES[1],
        *[jax.ShapeDtypeStruct((5, 3, 128), jnp.bfloat16)] * 2,
    )
    assert "tpu_custom_call" not in lowered_for("tpu", set_kv_buffer, *narrow)


def test_the_kernel_is_taken_within_shard_map_too() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("heads",))
    heads, slots = PartitionSpec(None, "heads"), PartitionSpec()
    split = jax.shard_map(set_kv_buffer, mesh=mesh, in_specs=(heads, slots, heads, heads), out_specs=heads)
    assert "tpu_custom_call" in lowered_for("tpu", split, *SHAPES)
