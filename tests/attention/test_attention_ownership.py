"""What the caller does to its arrays after a call changes nothing, and 64-bit mode changes no result."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from engine.attention import AttentionMetadata, FlashAttentionBackend
from engine.errors import ShapeError

PAGE, TOKENS, HEADS, DIM = 16, 512, 4, 64


def aligned(values):
    """A copy at a 64-byte boundary, which the CPU backend may alias instead of copying."""
    room = np.empty(values.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[:] = values
    return copy


def step():
    rng = np.random.default_rng(3)
    q, k, v = (aligned(rng.normal(size=(TOKENS, HEADS, DIM)).astype(np.float32)) for _ in range(3))
    table = aligned(np.arange(1, 1 + TOKENS // PAGE, dtype=np.int32)[None])
    metadata = AttentionMetadata.build(table, [0, TOKENS], [TOKENS], num_tokens=TOKENS, page_size=PAGE)
    arrays = {name: value for name, value in vars(metadata).items() if name != "by_table"}
    fields = {name: aligned(np.asarray(value)) for name, value in arrays.items()}
    return (q, k, v), fields


@pytest.mark.parametrize("victim", ["q", "k", "v", "page_table", "cu_q_lens", "kv_lens", "out_cache_loc"])
def test_changing_an_argument_after_the_call_changes_nothing(victim):
    backend = FlashAttentionBackend(page_size=PAGE, num_q_heads=HEADS, num_kv_heads=HEADS, head_dim=DIM)
    pool = jnp.zeros((TOKENS + PAGE, 2 * HEADS, DIM))
    (q, k, v), fields = step()
    expected = np.asarray(backend(q, k, v, pool, AttentionMetadata(**fields))[0])
    out, _ = backend(q, k, v, pool, AttentionMetadata(**fields))
    {"q": q, "k": k, "v": v, **fields}[victim][:] = 0
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("wrong", [[1.5], [2**32 + 1]])
def test_lengths_that_are_no_int32_are_refused_and_not_cast(wrong):
    with pytest.raises(ShapeError, match=r"kv_lens is .* integers within int32"):
        AttentionMetadata.build([[1]], [0, 1], wrong, num_tokens=1, page_size=PAGE)


def test_64_bit_mode_gives_the_same_answer():
    script = """
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
from engine import ragged_paged_attention
rng = np.random.default_rng(0)
q, k, v = (rng.normal(size=(9, heads, 64)).astype(np.float32) for heads in (4, 2, 2))
sizes = dict(page_table=np.array([[1, 2], [3, 4]], np.int32), cu_q_lens=np.array([0, 8, 9], np.int32),
             kv_lens=np.array([8, 1], np.int32), page_size=4, sliding_window=5, sinks=np.ones(4, np.float32))
pool = np.zeros((20, 4, 64), np.float32)
outs = [ragged_paged_attention(q, k, v, pool, impl=impl, **sizes)[0] for impl in ("xla", "reference")]
assert outs[0].dtype == np.float32
np.testing.assert_allclose(*outs, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
