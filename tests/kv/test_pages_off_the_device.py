"""The data plane and the control plane together: what leaves the pool comes back through the host tier and the disk."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from engine.errors import ConfigError
from engine.kv.page_copy import read_pages, write_pages
from engine.kv.pool import TokenToKVPool
from engine.memory.offload.host_tier import HostTier
from engine.memory.offload.page_format import PageFormat
from engine.memory.offload.store import PrefixStore
from engine.memory.scope import CacheScope, LayoutKey

PAGE_SIZE = 8


def format_of(pool):
    return PageFormat(pool.layer_num, pool.layout.page_dtype, pool.layout.to_dict())


def make_pool(dtype, *, platform="cpu"):
    return TokenToKVPool(16 * PAGE_SIZE, PAGE_SIZE, dtype, 2, 16, 3, platform=platform)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "int8", "int4"])
def test_pages_come_back_to_other_places_bit_for_bit(tmp_path, dtype):
    rng = np.random.default_rng()
    pool = make_pool(dtype)
    for layer_id in range(pool.layer_num):
        k, v = (jnp.asarray(rng.standard_normal((pool.size, 2, 16)), "float32") for _ in range(2))
        pool.set_kv_buffer(layer_id, jnp.arange(PAGE_SIZE, PAGE_SIZE + pool.size), k, v)
    form = format_of(pool)
    assert form.page_bytes == pool.kv_size_bytes // 17  # 16 pages and the null page
    scope = CacheScope("model", 0, None, "", LayoutKey.of(pool.layout.to_dict()))
    tokens = rng.integers(0, 50_000, 6 * PAGE_SIZE + 3)

    data = read_pages(pool, [4, 2, 9, 16, 1, 5])
    tier = HostTier(6 * form.page_bytes, form)
    tier.put(scope, tokens[: 6 * PAGE_SIZE], 0, data)
    PrefixStore(tmp_path, form).save(tier.segments())
    restored = HostTier(6 * form.page_bytes, form)
    for segment in PrefixStore(tmp_path, form).load():
        restored.put(segment.scope, segment.token_ids, segment.first_page, segment.data)

    assert restored.held(scope, tokens).tolist() == [True] * 6
    other = make_pool(dtype)
    write_pages(other, [3, 8, 6, 7], restored.get(scope, tokens, 2))
    assert np.array_equal(read_pages(other, [3, 8, 6, 7]).view(np.uint8), data[2:].view(np.uint8))
    assert restored.counters.loaded_pages == 4


def test_a_pool_of_another_layout_is_refused():
    tier_format, other = format_of(make_pool("bfloat16")), format_of(make_pool("bfloat16", platform="tpu"))
    with pytest.raises(ConfigError, match=r"lanes 128 \(here 16\)"):
        tier_format.require_same(other.to_dict(), "the pool")
