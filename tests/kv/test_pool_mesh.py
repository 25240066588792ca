"""A pool split over several devices; in a process of its own, because virtual devices are fixed when jax starts."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import jax, numpy as np, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from engine.errors import ConfigError
from engine.kv.layout import merge_kv
from engine.kv.pool import TokenToKVPool
from engine.kv.scatter import set_kv_buffer

mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
make = lambda heads, **more: TokenToKVPool(32, 8, "bfloat16", heads, 16, 2, mesh, **more)
pool = make(8)
rng = np.random.default_rng()
k, v = (jnp.asarray(x).astype("bfloat16") for x in rng.standard_normal((2, 5, 8, 16)))
loc = jnp.array([9, -1, 39, 9, 12])
wanted = np.zeros((40, 16, 16), "bfloat16")
wanted[[39, 9, 12]] = np.asarray(merge_kv(k, v))[2:]

def pointers(buffer):
    return [shard.data.unsafe_buffer_pointer() for shard in buffer.addressable_shards]

# Each device has its pairs, and a write moves none of them.
assert {shard.data.shape for shard in pool.buffers[0].addressable_shards} == {(40, 4, 16)}
before = pointers(pool.buffers[1])
pool.set_kv_buffer(1, loc, k, v)
assert pointers(pool.buffers[1]) == before
np.testing.assert_array_equal(np.asarray(pool.buffers[1]), wanted)
assert not np.asarray(pool.buffers[0]).any()

# The same inside a user's jit, and the pure function inside a user's shard_map, checked for replication or not.
def step(pool, loc, k, v):
    pool.set_kv_buffer(0, loc, k, v)
    return pool
program = jax.jit(step, donate_argnums=0).lower(pool, loc, k, v).compile()
assert "all-gather" not in program.as_text()
before = pointers(pool.buffers[0])
pool = program(pool, loc, *jax.device_put((k, v), program.input_shardings[0][2:]))
assert pointers(pool.buffers[0]) == before
np.testing.assert_array_equal(np.asarray(pool.buffers[0]), wanted)
heads = P(None, "tensor", None)
for check in (True, False):
    split = jax.shard_map(
        set_kv_buffer, mesh=mesh, in_specs=(heads, P(), heads, heads), out_specs=heads, check_vma=check
    )
    got = jax.jit(split)(jnp.zeros((40, 16, 16), "bfloat16"), loc, k, v)
    np.testing.assert_array_equal(np.asarray(got), wanted)

# Left to XLA the write is whole, if not split.
np.testing.assert_array_equal(np.asarray(jax.jit(set_kv_buffer)(pool.buffers[0] * 0, loc, k, v)), wanted)

# What would part a pair, or pad inside the buffer, is refused.
for heads, platform, words in ((6, "cpu", "do not split over 4 devices"), (12, "tpu", "padding inside")):
    try:
        make(heads, platform=platform)
    except ConfigError as error:
        assert words in str(error), error
    else:
        raise SystemExit(f"{heads} heads on {platform} were accepted")
assert make(8, platform="tpu").layout.rows == 16
print("done")
"""


def test_a_split_pool_writes_each_devices_heads_in_place():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "done"
