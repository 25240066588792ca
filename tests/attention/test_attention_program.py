"""What the compiled program does: in place, memory bounded by a block, one program for every length."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_impls import FAST
from attention_oracle import Geometry, make_case

from engine.attention import ragged_paged_attention

ROWS, KV_HEADS, Q_HEADS, HEAD_DIM, PAGE = 4, 4, 8, 128, 16


def compiled(tokens: int, pages: int, columns: int, dtype: Any, impl: str) -> Any:
    def step(q: Any, k: Any, v: Any, pool: Any, table: Any, bounds: Any, lens: Any) -> Any:
        return ragged_paged_attention(
            q, k, v, pool, page_table=table, cu_q_lens=bounds, kv_lens=lens, page_size=PAGE, impl=impl
        )

    shapes = [
        ((tokens, Q_HEADS, HEAD_DIM), dtype),
        ((tokens, KV_HEADS, HEAD_DIM), dtype),
        ((tokens, KV_HEADS, HEAD_DIM), dtype),
        ((pages * PAGE, 2 * KV_HEADS, HEAD_DIM), dtype),
        ((ROWS, columns), jnp.int32),
        ((ROWS + 1,), jnp.int32),
        ((ROWS,), jnp.int32),
    ]
    return jax.jit(step, donate_argnums=3).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_temporary_memory_depends_neither_on_the_pool_nor_on_the_context(dtype: Any, impl: str) -> None:
    small = compiled(4, 300, 64, dtype, impl).memory_analysis()
    large = compiled(4, 20_000, 4096, dtype, impl).memory_analysis()
    pool_bytes = 20_000 * PAGE * 2 * KV_HEADS * HEAD_DIM * jnp.dtype(dtype).itemsize
    table_bytes = ROWS * 4096 * 4
    assert large.alias_size_in_bytes >= pool_bytes
    # The page table may be copied to be padded to whole blocks; no more.
    assert large.temp_size_in_bytes <= small.temp_size_in_bytes + 2 * table_bytes
    assert large.temp_size_in_bytes < pool_bytes / 50


def test_the_pool_stays_at_its_address() -> None:
    case = make_case(Geometry(), [10, 1, 0, 20], [11, 30, 4, 0], seed=51)
    pool = jnp.array(case.pool)
    address = pool.unsafe_buffer_pointer()
    step = jax.jit(
        lambda pool: ragged_paged_attention(case.q, case.k, case.v, pool, **case.arguments()), donate_argnums=0
    )
    for _ in range(3):
        _, pool = step(pool)
        assert pool.unsafe_buffer_pointer() == address


def test_new_lengths_compile_nothing() -> None:
    geometry = Geometry(columns=7)
    traces = 0

    @jax.jit
    def step(q: Any, k: Any, v: Any, pool: Any, table: Any, bounds: Any, lens: Any) -> Any:
        nonlocal traces
        traces += 1
        return ragged_paged_attention(
            q, k, v, pool, page_table=table, cu_q_lens=bounds, kv_lens=lens, page_size=geometry.page_size
        )

    for seed, (q_lens, prefix_lens) in enumerate(
        [([1, 1, 1, 1], [9, 0, 90, 1]), ([48, 0, 0, 0], [3, 1, 2, 0]), ([0, 5, 1, 30], [9, 17, 100, 2])]
    ):
        case = make_case(geometry, q_lens, prefix_lens, seed)
        out, _ = step(case.q, case.k, case.v, case.pool, case.page_table, case.cu_q_lens, case.kv_lens)
        np.testing.assert_allclose(out, case.expected_out(), atol=2e-5)
    assert traces == 1
