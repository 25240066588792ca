"""int8 and int4 pools over meshes against pools on one device: bytes, page copies, attention. A line of JSON a case."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from attention_oracle import Geometry, make_case

from engine.attention import AttentionMetadata, FlashAttentionBackend, MeshAttention, ragged_paged_attention
from engine.distributed.mesh import make_mesh, named
from engine.kv import TokenToKVPool, copy_pages, read_pages, write_pages

GEOMETRY = Geometry(q_heads=8, kv_heads=4, head_dim=32, page_size=16, window=32, sinks=True)
rng = np.random.default_rng()


def pointers(pool):
    parts = jax.tree.leaves(pool.buffers)
    return [shard.data.unsafe_buffer_pointer() for part in parts for shard in part.addressable_shards]


def make_pool(dtype, mesh=None):
    geometry = GEOMETRY
    size = (geometry.pages - 1) * geometry.page_size
    return TokenToKVPool(size, geometry.page_size, dtype, geometry.kv_heads, geometry.head_dim, 1, mesh)


def fill(pool, cases):
    slots = np.tile(np.arange(cases[0].pool.shape[0], dtype=np.int32), len(cases))
    k, v = (np.concatenate([case.pool[:, half::2] for case in cases]) for half in (0, 1))
    pool.set_kv_buffer(0, slots, k, v)


def attend(pool, cases, mesh):
    geometry = GEOMETRY
    options = geometry.options() | {"num_q_heads": 8, "num_kv_heads": 4, "head_dim": 32, "impl": "xla"}
    steps = [
        AttentionMetadata.build(
            case.page_table, case.cu_q_lens, case.kv_lens, num_tokens=geometry.tokens, page_size=geometry.page_size
        )
        for case in cases
    ]
    q, k, v = (jnp.asarray(np.concatenate([getattr(case, name) for case in cases])) for name in ("q", "k", "v"))
    metadata = jax.tree.map(lambda *arrays: np.concatenate(arrays), *steps)
    backend = FlashAttentionBackend(**options)
    if mesh is not None:
        backend, metadata = MeshAttention.over(backend, mesh), jax.device_put(metadata, named(mesh, "data"))

    def step(buffer, metadata):
        prepared = metadata if mesh is None else backend.prepare(metadata)
        return backend(q, k, v, buffer, prepared, sinks=cases[0].sinks)

    program = jax.jit(step, donate_argnums=0).lower(pool.buffers[0], metadata).compile()
    out, buffer = program(pool.buffers[0], metadata)
    pool.replace_buffers([buffer])
    return np.asarray(out), program


def run(axes, dtype):
    mesh = make_mesh(**axes)
    pool = make_pool(dtype, mesh)
    cases = [make_case(GEOMETRY, [9, 0, 1, 20], [30, 4, 61, 0], seed=7 + i) for i in range(pool.replicas)]
    before, pages = pointers(pool), np.arange(1, GEOMETRY.pages)
    fill(pool, cases)
    out, program = attend(pool, cases, mesh)
    wrong, error = [], 0.0
    for replica, case in enumerate(cases):
        alone = make_pool(dtype)
        fill(alone, [case])
        case.sinks = cases[0].sinks
        expected, _ = attend(alone, [case], None)
        error = max(error, float(np.abs(np.split(out, len(cases))[replica] - expected).max()))
        if not np.array_equal(read_pages(pool, pages, replica=replica), read_pages(alone, pages)):
            wrong.append(f"pages of replica {replica}")
        values = np.split(np.asarray(pool.get_kv_buffer(0)[0]), len(cases))[replica]
        if not np.array_equal(values, np.asarray(alone.get_kv_buffer(0)[0])):
            wrong.append(f"keys of replica {replica}")
        data = read_pages(alone, [3, 5])
        for each, more in ((pool, {"replica": replica}), (alone, {})):
            copy_pages(each, [2], [7], **more)
            write_pages(each, [4, 6], data, **more)
        if not np.array_equal(read_pages(pool, pages, replica=replica), read_pages(alone, pages)):
            wrong.append(f"moved pages of replica {replica}")
    return {
        "error": error,
        "wrong": wrong,
        "moved": pointers(pool) != before,
        "gathers": program.as_text().count("all-gather"),
        "bytes": pool.kv_size_bytes - sum(part.nbytes for part in jax.tree.leaves(pool.buffers)),
    }


def run_explicit(dtype):
    """A call alone over a mesh of Explicit axes: each device attends the heads that it holds."""
    mesh = jax.make_mesh((2,), ("tensor",))
    case = make_case(GEOMETRY, [9, 0, 1, 20], [30, 4, 61, 0], seed=7)
    results = []
    for pool in (make_pool(dtype), make_pool(dtype, mesh)):
        fill(pool, [case])
        arguments = case.arguments()
        out, buffer = ragged_paged_attention(case.q, case.k, case.v, pool.buffers[0], impl="xla", **arguments)
        results.append((np.asarray(out), read_pages(pool.replace_buffers([buffer]), np.arange(1, GEOMETRY.pages))))
    (one, bytes_one), (two, bytes_two) = results
    return {"error": float(np.abs(one - two).max()), "wrong": [] if np.array_equal(bytes_one, bytes_two) else ["pages"]}


for axes, dtype in json.loads(sys.argv[1]):
    print(json.dumps({"case": [axes, dtype], **(run(axes, dtype) if axes else run_explicit(dtype))}), flush=True)
