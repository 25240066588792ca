from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from engine.kv.scatter_tpu import scatter_rows_tpu


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rows_land_in_their_slots_and_dropped_ones_nowhere(dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(0)
    fused = rng.standard_normal((40, 4, 128)).astype(dtype)
    rows = rng.standard_normal((7, 4, 128)).astype(dtype)
    loc = np.array([3, -1, 39, 40, 0, -2, 17], np.int32)
    want = fused.copy()
    want[loc[[0, 2, 4, 6]]] = rows[[0, 2, 4, 6]]
    try:
        found = scatter_rows_tpu(fused, loc, rows, interpret=pltpu.InterpretParams(detect_races=True))
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), want.view(np.uint8))
    finally:
        pltpu.reset_tpu_interpret_mode_state()
