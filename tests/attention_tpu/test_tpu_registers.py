"""The production way of loading K and V, which the new interpreter lacks and legacy interpret mode has."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from tpu_cases import SMALL

from engine.attention.tpu.geometry import Geometry
from engine.attention.tpu.registers import load_kv


@pytest.mark.parametrize(
    ("dtype", "heads"), [(jnp.bfloat16, 4), (jnp.bfloat16, 1), (jnp.float32, 2), (jnp.float8_e4m3fn, 4)]
)
def test_words_and_indices_load_the_same_rows(dtype: jnp.dtype, heads: int) -> None:
    dtype = jnp.dtype(dtype)
    pack = 4 // dtype.itemsize
    geo = Geometry(
        heads=heads, group=4, lanes=128, words=max(2 * heads // pack, 1), page_size=16, run_pages=1, table_pages=8,
        kv_dtype=dtype, compute_dtype=jnp.dtype(jnp.float32), io_dtype=jnp.dtype(jnp.float32), soft_cap=None,
        window=None, has_lse=False, interpret=False, blocks=SMALL,
    )  # fmt: skip
    shape = (4, 16, geo.stride, pack, 128)
    cached = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    rows = cached[:, :, : geo.words].reshape(64, -1, 128).astype(np.float32)

    def load(one: Geometry) -> tuple[np.ndarray, np.ndarray]:
        def body(pages: object, out: jax.Array) -> None:
            for head in range(heads):
                k, v = load_kv(one, pages, head, None)
                out[head, 0], out[head, 1] = k, v

        call = pl.pallas_call(
            body,
            out_shape=jax.ShapeDtypeStruct((heads, 2, 64, 128), jnp.float32),
            in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)],
            interpret=True,
        )
        return np.asarray(call(cached))

    for one in (geo, dataclasses.replace(geo, interpret=True)):
        found = load(one)
        for head in range(heads):
            np.testing.assert_array_equal(found[head, 0], rows[:, 2 * head])
            np.testing.assert_array_equal(found[head, 1], rows[:, 2 * head + 1])
