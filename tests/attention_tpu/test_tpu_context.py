"""The kernel under context parallel attention: each device's part in the interpreter, merged, against the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_cases import make_step, oracle, run

from engine.attention import AttentionMetadata
from engine.attention.context_parallel import merge_parts, rows_of_device
from engine.attention.metadata import locate_new_tokens
from engine.distributed.mesh import CONTEXT_AXIS
from engine.kv.scatter import set_kv_buffer

MIXED = [(1, 5), (0, 40), (1, 301), (40, 170), (3, 3), (1, 129), (7, 64)]


def each_part(function, parts, *arguments):
    """Calls ``function`` as every device along the axis would, one device being all."""
    return jax.vmap(function, axis_name=CONTEXT_AXIS, axis_size=parts, in_axes=None)(*arguments)


@pytest.mark.parametrize(("parts", "sinks"), [(2, True), pytest.param(4, False, marks=pytest.mark.slow)])
def test_parts_of_dealt_out_tokens_merge_to_the_whole(parts, sinks):
    seed = int(np.random.default_rng().integers(2**31))
    step = make_step(seed, MIXED, page_size=16 * parts, dtype=jnp.float32)
    described = (step.page_table, step.cu_q_lens, step.kv_lens)
    positions, slots = locate_new_tokens(*described, num_tokens=step.q.shape[0], page_size=step.page_size, xp=np)
    metadata = AttentionMetadata(*described, slots, positions)
    devices = each_part(lambda metadata: rows_of_device(metadata, parts), parts, metadata)
    outs, lses = [], []
    for part in range(parts):
        mine = jax.tree.map(lambda array, part=part: np.asarray(array[part]), devices)
        written = set_kv_buffer(jnp.array(step.fused[part::parts]), mine.out_cache_loc, step.k, step.v)
        rows = mine.rows
        local = dataclasses.replace(
            step,
            q=step.q[mine.order],
            fused=np.asarray(written),
            page_table=rows.page_table,
            cu_q_lens=rows.cu_q_lens,
            kv_lens=rows.kv_lens,
            page_size=step.page_size // parts,
        )
        out, kept, lse = run(local, slots=rows.out_cache_loc, races=True, return_lse=True)
        np.testing.assert_array_equal(kept, local.fused)  # reading wrote nothing
        outs.append(out[mine.place])
        lses.append(lse[mine.place])
    row = np.random.default_rng(seed).standard_normal(step.q.shape[1]).astype(np.float32) if sinks else None
    merge = jax.vmap(lambda out, lse: merge_parts(out, lse, row), axis_name=CONTEXT_AXIS)
    expected, _, _ = oracle(step, sinks=row)
    live = int(step.cu_q_lens[-1])
    # float32 throughout: sums of at most 301 terms, in another order than the oracle's float64.
    for merged in np.asarray(merge(np.stack(outs), np.stack(lses))):
        np.testing.assert_allclose(merged[:live], expected[:live], atol=1e-5, rtol=1e-5, err_msg=f"seed {seed}")
        assert not merged[live:].any()


def test_padding_with_zeros_and_with_the_last_sum_mean_the_same():
    table, lens = np.array([[1, 2], [3, 4], [0, 0]], np.int32), np.array([9, 3, 0], np.int32)
    built = AttentionMetadata.build(table, [0, 5, 8, 8], lens, num_tokens=10, page_size=8)
    zeros = dataclasses.replace(built, cu_q_lens=np.array([0, 5, 8, 0], np.int32))
    expected, found = (each_part(lambda metadata: rows_of_device(metadata, 2), 2, step) for step in (built, zeros))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
