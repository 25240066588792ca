"""Moves pages of pools over meshes and compares them with a NumPy model: one line of JSON a mesh."""

from __future__ import annotations

import json
import sys

import jax.numpy as jnp
import numpy as np

from engine.distributed.mesh import make_mesh
from engine.kv.layout import merge_kv
from engine.kv.page_copy import copy_pages, read_pages, write_pages
from engine.kv.pool import TokenToKVPool

PAGES, PAGE, HEADS, DIM, LAYERS = 5, 8, 4, 16, 2
rng = np.random.default_rng()


def pointers(pool):
    return [[shard.data.unsafe_buffer_pointer() for shard in buffer.addressable_shards] for buffer in pool.buffers]


def run(axes, dtype):
    mesh = make_mesh(**axes)
    pool = TokenToKVPool(PAGES * PAGE, PAGE, dtype, HEADS, DIM, LAYERS, mesh)
    # [replica, page, layer, token, 2H, D]; tokens go in by slot first, as a step writes them.
    model = rng.standard_normal((pool.replicas, PAGES + 1, LAYERS, PAGE, 2, HEADS, DIM)).astype(dtype)
    fused = np.asarray(merge_kv(jnp.asarray(model[..., 0, :, :]), jnp.asarray(model[..., 1, :, :]))).copy()
    slots = np.tile(np.arange(PAGE, (PAGES + 1) * PAGE, dtype=np.int32), pool.replicas)
    before = pointers(pool)
    for layer in range(LAYERS):
        k, v = (model[:, 1:, layer, :, half].reshape(-1, HEADS, DIM) for half in (0, 1))
        pool.set_kv_buffer(layer, slots, k, v)
    wrong = []
    everything = np.arange(1, PAGES + 1)

    def compare(step):
        for replica in range(pool.replicas):
            got = read_pages(pool, everything, replica=replica)
            wrong.extend([] if np.array_equal(got, fused[replica, 1:]) else [f"{step} of replica {replica}"])

    compare("set")
    for replica in rng.permutation(pool.replicas).tolist():
        source, target, third = (rng.permutation(PAGES)[:3] + 1).tolist()
        copy_pages(pool, [source], [target], replica=replica)
        fused[replica, target] = fused[replica, source]
        compare("copy")
        data = rng.standard_normal((1, LAYERS, PAGE, 2 * HEADS, DIM)).astype(dtype)
        write_pages(pool, [third], data, replica=replica)
        fused[replica, third] = data[0]
        compare("write")
    k, _ = pool.get_kv_buffer(1)
    by_slot = np.asarray(k).reshape(pool.replicas, PAGES + 1, PAGE, HEADS, DIM)[:, 1:]
    if not np.array_equal(by_slot, fused[:, 1:, 1, :, 0::2]):
        wrong.append("get_kv_buffer")
    return {
        "wrong": wrong,
        "moved": pointers(pool) != before,
        "bytes": pool.device_bytes * mesh.size - pool.kv_size_bytes,
    }


for axes, dtype in json.loads(sys.argv[1]):
    print(json.dumps({"case": [axes, dtype], **run(axes, dtype)}), flush=True)
