"""What set_kv_buffer must do, in a plain loop, and random cases for it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np


def random_case(slots, heads, head_dim, tokens, dtype, rows=None, lanes=None):
    """A buffer full of noise, padding too, and tokens to write."""
    rng = np.random.default_rng()
    noise = rng.standard_normal((slots, rows or 2 * heads, lanes or head_dim))
    k, v = rng.standard_normal((2, tokens, heads, head_dim))
    return tuple(jnp.asarray(array.astype(jnp.dtype(dtype))) for array in (noise, k, v))


def expected(fused, loc, k, v):
    """The same in a plain loop over tokens; the last of equal slots stays because it comes last."""
    result = np.array(fused)
    for t, slot in enumerate(np.asarray(loc, np.int64)):
        if 0 <= slot < len(result):
            result[slot] = 0
            for h in range(k.shape[1]):
                result[slot, 2 * h, : k.shape[2]] = np.asarray(k[t, h], result.dtype)
                result[slot, 2 * h + 1, : k.shape[2]] = np.asarray(v[t, h], result.dtype)
    return result


def assert_same_bits(actual, wanted):
    assert actual.dtype == wanted.dtype
    assert np.asarray(actual).tobytes() == np.asarray(wanted).tobytes()
