"""Attention over meshes against the float64 oracle: one line of JSON per case."""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from attention_oracle import Geometry, make_case
from jax.sharding import NamedSharding

from engine.attention import AttentionMetadata, FlashAttentionBackend, MeshAttention
from engine.distributed.mesh import axis_size, make_mesh, named
from engine.kv.split import buffer_spec, in_slot_order, new_tokens_spec

rng = np.random.default_rng()


def batch(geometry):
    """Sequences that fill the tokens and rows in part: new ones, chunks, decode, and one without new tokens."""
    q_lens = [int(rng.integers(1, 20)), 0, 1, int(rng.integers(2, 20))]
    prefix_lens = [int(rng.integers(0, geometry.row_tokens - q_len + 1)) for q_len in q_lens]
    prefix_lens[int(rng.choice([0, 3]))] = 0
    return make_case(geometry, q_lens, prefix_lens, seed=int(rng.integers(2**31)))


def in_device_order(pool, parts):
    """Slots dealt out in turn, device by device."""
    return np.concatenate([pool[rank::parts] for rank in range(parts)])


def run(mesh_axes, options, impl):
    geometry = dataclasses.replace(Geometry(), **options)
    mesh = make_mesh(**mesh_axes)
    replicas, parts = axis_size(mesh, "data"), axis_size(mesh, "context")
    cases = [batch(geometry).poisoned() for _ in range(replicas)]
    backend = MeshAttention.over(
        FlashAttentionBackend(
            num_q_heads=geometry.q_heads,
            num_kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            impl=impl,
            **geometry.options(),
        ),
        mesh,
    )
    steps = [
        AttentionMetadata.build(
            case.page_table, case.cu_q_lens, case.kv_lens, num_tokens=geometry.tokens, page_size=geometry.page_size
        )
        for case in cases
    ]
    metadata = jax.device_put(jax.tree.map(lambda *arrays: np.concatenate(arrays), *steps), named(mesh, "data"))
    new = NamedSharding(mesh, new_tokens_spec(mesh))
    q, k, v = (jax.device_put(np.concatenate([getattr(case, name) for case in cases]), new) for name in ("q", "k", "v"))
    stored = np.concatenate([in_device_order(case.pool, parts) for case in cases])
    # A copy: an array that aliases NumPy memory cannot be donated.
    pool = jax.jit(jnp.copy)(jax.device_put(stored, NamedSharding(mesh, buffer_spec(mesh))))
    heads = {name: getattr(cases[0], name) for name in ("sinks", "k_scale", "v_scale")}
    for case in cases[1:]:
        vars(case).update(heads)

    def step(pool, q, k, v, metadata, heads):
        return backend(q, k, v, pool, backend.prepare(metadata), **heads)

    program = jax.jit(step, donate_argnums=0).lower(pool, q, k, v, metadata, heads).compile()
    before = [shard.data.unsafe_buffer_pointer() for shard in pool.addressable_shards]
    out, pool = program(pool, q, k, v, metadata, heads)
    errors = [
        np.abs(got.astype(np.float64) - case.expected_out())[: sum(case.q_lens)].max()
        for got, case in zip(np.split(np.asarray(out), replicas), cases, strict=True)
    ]
    padding = max(
        np.abs(got.astype(np.float32)[sum(case.q_lens) :]).max()
        for got, case in zip(np.split(np.asarray(out), replicas), cases, strict=True)
    )
    pools = np.split(np.asarray(in_slot_order(pool, mesh)), replicas)
    memory = program.memory_analysis()
    share = pool.nbytes // mesh.size
    return {
        "error": float(max(errors)),
        "padding": float(padding),
        "pool": all(np.array_equal(a, c.expected_pool(), equal_nan=True) for a, c in zip(pools, cases, strict=True)),
        "moved": [shard.data.unsafe_buffer_pointer() for shard in pool.addressable_shards] != before,
        "aliased": memory.alias_size_in_bytes == share,
        "gathers": program.as_text().count("all-gather"),
    }


for mesh_axes, options, impl in json.loads(sys.argv[1]):
    print(json.dumps({"case": [mesh_axes, options, impl], **run(mesh_axes, options, impl)}), flush=True)
