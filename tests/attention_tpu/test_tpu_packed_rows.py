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

from engine.attention.impl.tpu.block_sizes import make_tiles
from engine.attention.impl.tpu.contract.geometry import Geometry
from engine.attention.impl.tpu.kernel.packed_rows import load_kv
from engine.kv.layout import padded_rows
from engine.kv.tpu_view import view_words


@pytest.mark.parametrize(
    ("dtype", "heads", "lanes"),
    [
        (jnp.bfloat16, 4, 128),
        (jnp.bfloat16, 1, 128),
        (jnp.float32, 2, 128),
        (jnp.float8_e4m3fn, 4, 128),
        (jnp.bfloat16, 8, 256),
        (jnp.bfloat16, 2, 256),
        (jnp.float32, 8, 256),
        (jnp.float8_e4m3fn, 4, 256),
    ],
)
def test_words_and_indices_load_the_same_rows(dtype: jnp.dtype, heads: int, lanes: int) -> None:
    dtype = jnp.dtype(dtype)
    stored = np.random.default_rng(0).standard_normal((64, padded_rows(heads, dtype), lanes)).astype(dtype)
    words = np.asarray(view_words(jnp.asarray(stored)))
    geo = Geometry(
        heads=heads, group=4, lanes=lanes, words=words.shape[1], q_words=4 * heads, page_size=16, run_pages=1,
        table_pages=8, plan_rows=8,
        kv_dtype=dtype, compute_dtype=jnp.dtype(jnp.float32), io_dtype=jnp.dtype(jnp.float32), soft_cap=None,
        window=None, has_lse=False, q_scale=1.0, fresh_tokens=0, interpret=False, tiles=make_tiles(SMALL, 4, 16),
    )  # fmt: skip
    cached = np.zeros((4, 16, geo.stride, geo.pack, 128), dtype)
    cached[:, :, : geo.words] = words.reshape(4, 16, *words.shape[1:])
    rows = stored.astype(np.float32)

    def load(one: Geometry) -> tuple[np.ndarray, np.ndarray]:
        def body(pages: object, out: jax.Array) -> None:
            for head in range(heads):
                k, v = load_kv(one, pages, head, None)
                out[head, 0], out[head, 1] = k, v

        call = pl.pallas_call(
            body,
            out_shape=jax.ShapeDtypeStruct((heads, 2, 64, lanes), jnp.float32),
            in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)],
            interpret=True,
        )
        return np.asarray(call(cached))

    for one in (geo, dataclasses.replace(geo, interpret=True)):
        found = load(one)
        for head in range(heads):
            np.testing.assert_array_equal(found[head, 0], rows[:, 2 * head])
            np.testing.assert_array_equal(found[head, 1], rows[:, 2 * head + 1])
