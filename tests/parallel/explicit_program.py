"""Pool, layout, scatter and attention over jax's own meshes, against one device: one line of JSON per case."""

from __future__ import annotations

import contextlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from attention_oracle import Geometry, make_case, relative_error, same_bits
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from engine import (
    BackendUnsupported,
    TokenToKVPool,
    copy_pages,
    extract_k_from_fused_kv,
    extract_v_from_fused_kv,
    merge_kv,
    ragged_paged_attention,
    read_pages,
    set_kv_buffer,
    write_pages,
)
from engine.native import library

rng = np.random.default_rng()
GEOMETRY = Geometry(q_heads=8, kv_heads=4, sinks=True, scales=True)
HEADS = PartitionSpec(None, "tensor", None)


def check_layout(put, case):
    fused = merge_kv(put(case.k), put(case.v))
    right = same_bits(fused, merge_kv(jnp.array(case.k), jnp.array(case.v)))
    for transform in (lambda f: f, jax.jit):
        right &= same_bits(transform(merge_kv)(put(case.k), put(case.v)), fused)
        right &= same_bits(transform(extract_k_from_fused_kv)(fused), case.k)
        right &= same_bits(transform(extract_v_from_fused_kv)(fused), case.v)
    return right


def check_pool(mesh, put, case):
    pool = TokenToKVPool(64, 16, jnp.float32, 4, 64, 2, mesh)
    before = [shard.data.unsafe_buffer_pointer() for shard in pool.buffers[1].addressable_shards]
    loc = rng.permutation(np.arange(16, 80))[:48].astype(np.int32)
    pool.set_kv_buffer(1, loc, put(case.k), put(case.v))
    keys, values = pool.get_kv_buffer(1)
    right = same_bits(np.asarray(keys)[loc], case.k) and same_bits(np.asarray(values)[loc], case.v)
    pages = read_pages(pool, [1, 2, 3])
    write_pages(pool, [4], pages[:1])
    copy_pages(pool, [2], [1])
    right &= same_bits(read_pages(pool, [4, 1]), pages[:2])
    after = [shard.data.unsafe_buffer_pointer() for shard in pool.buffers[1].addressable_shards]
    adopted = TokenToKVPool.from_buffers(pool.buffers, 16, 4, 64, mesh)
    return right and before == after and adopted.size == 64 and pool.buffers[1].sharding.spec[1] == "tensor"


def check_calls(put, case):
    loc = np.full(48, -1, np.int32)
    loc[:34] = [case.slot(row, case.prefix_lens[row] + i) for row, q in enumerate(case.q_lens) for i in range(q)]
    plain = case.k.astype(np.float32), case.v.astype(np.float32)
    want = set_kv_buffer(jnp.array(case.pool), loc, *plain)
    right = all(
        same_bits(transform(set_kv_buffer)(put(case.pool), loc, *map(put, plain)), want)
        for transform in (lambda f: f, jax.jit)
    )
    expected, errors = case.expected_out(), {}
    impls = ["reference", "xla", "auto"] + ["cpu"] * library.available()
    for impl in impls:
        for transform in (lambda f: f, jax.jit):
            attend = transform(lambda *qkvf, impl=impl: ragged_paged_attention(*qkvf, **case.arguments(), impl=impl))
            out, fused = attend(put(case.q), put(case.k), put(case.v), put(case.pool))
            errors[impl] = max(errors.get(impl, 0.0), relative_error(out, expected))
            right &= same_bits(fused, case.expected_pool())
    return right, errors


def refusal(mesh, case):
    """A cache whose slots are split over the mesh belongs to a pool over it."""
    by_slot = jax.device_put(case.pool, NamedSharding(mesh, PartitionSpec("tensor")))
    try:
        set_kv_buffer(by_slot, np.arange(48, dtype=np.int32), case.k, case.v)
    except BackendUnsupported as error:
        return str(error)
    return ""


def main():
    for kind in ("Auto", "Explicit"):
        mesh = jax.make_mesh((4,), ("tensor",), axis_types=(getattr(AxisType, kind),))
        for is_set in (False, True):
            case = make_case(GEOMETRY, [10, 0, 1, 23], [5, 40, 30, 0], seed=int(rng.integers(2**31)))

            def put(array, mesh=mesh):
                return jax.device_put(array, NamedSharding(mesh, HEADS))

            with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
                calls, errors = check_calls(put, case)
                report = {"layout": check_layout(put, case), "pool": check_pool(mesh, put, case), "calls": calls}
            report |= {"case": [kind, is_set], "errors": errors}
            print(json.dumps(report | {"refusal": refusal(mesh, case) if kind == "Explicit" else ""}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
