"""Pages, scopes and formats for the tests of the host tier and the store."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from engine.memory.offload.page_format import PageFormat
from engine.memory.scope import Adapter, CacheScope, LayoutKey

PAGE_SIZE = 4


def page_format(dtype=ml_dtypes.bfloat16, *, layer_num=2, **changes):
    dtype = np.dtype(dtype)
    layout = {"head_num": 2, "head_dim": 3, "rows": 4, "lanes": 3, "page_size": PAGE_SIZE, "order": "interleaved"}
    return PageFormat(layer_num, dtype, {**layout, "version": 1, "dtype": dtype.name, **changes})


def scope(model="m", *, epoch=0, adapter=None, salt=""):
    return CacheScope(model, epoch, adapter and Adapter(adapter), salt, LayoutKey.of(page_format().layout))


def random_pages(rng, form, count):
    """Pages of random bits, NaNs of every kind among them."""
    shape = (count, form.page_bytes)
    return rng.integers(0, 256, shape, np.uint8).view(form.dtype).reshape(count, *form.page_shape)


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def same_bits(left, right):
    return left.shape == right.shape and left.dtype == right.dtype and np.array_equal(bits(left), bits(right))
