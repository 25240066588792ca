"""When ``impl="gpu"`` is taken, and what it refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from engine import ragged_paged_attention
from engine.attention.impl.gpu import gpu_entry
from engine.attention.impl.gpu.gpu_entry import check_supported
from engine.attention.options import AttentionOptions
from engine.errors import BackendUnsupported
from engine.kv import gpu_target
from engine.kv.gpu_target import HOPPER, OLDEST_JAX, multiprocessors, not_hopper


def like(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def check(**changes: Any) -> None:
    sizes = {
        "q": like(9, 8, 128),
        "k": like(9, 2, 128),
        "fused_kv": like(64, 4, 128),
        "options": AttentionOptions(16, 0.1),
    }
    check_supported(**sizes | changes)


def test_it_takes_what_the_kernels_were_made_for() -> None:
    check()
    check(options=AttentionOptions(8, 0.1))
    half = {name: like(*shape, dtype=jnp.float16) for name, shape in (("q", (9, 8, 64)), ("k", (9, 2, 64)))}
    check(**half, fused_kv=like(64, 4, 64, dtype=jnp.float16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": like(9, 8, 128, dtype=jnp.float32)}, "float32 over bfloat16"),
        ({"fused_kv": like(64, 4, 128, dtype=jnp.float8_e4m3fn)}, "bfloat16 over float8"),
        ({"q": like(9, 8, 80), "k": like(9, 2, 80), "fused_kv": like(64, 4, 80)}, "heads of 64 or 128"),
        ({"fused_kv": like(64, 8, 128)}, "without padding"),
        ({"q": like(9, 130, 128)}, "up to 64 query heads"),
        ({"options": AttentionOptions(12, 0.1)}, "multiple of 8 tokens, not 12"),
        ({"options": AttentionOptions(16, -0.1)}, "above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_refuses_what_they_were_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendUnsupported, match=message):
        check(**changes)


def test_without_a_gpu_the_kernel_raises_and_auto_uses_xla() -> None:
    rng = np.random.default_rng()
    q, k = (rng.standard_normal((3, heads, 64)).astype(np.float16) for heads in (4, 2))
    call = {
        "page_table": np.array([[1]], np.int32),
        "cu_q_lens": np.array([0, 3], np.int32),
        "kv_lens": np.array([3], np.int32),
        "page_size": 16,
    }
    pool = jnp.zeros((32, 4, 64), jnp.float16)
    with pytest.raises(BackendUnsupported, match=r"impl='gpu' cannot run.*impl='auto'"):
        ragged_paged_attention(q, k, k, pool, **call, impl="gpu")
    out, _ = ragged_paged_attention(q, k, k, pool, **call)
    assert np.isfinite(np.asarray(out, np.float32)).all()


def test_an_old_jax_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_target, "OLDEST_JAX", (99, 0, 0))
    assert "is older than 99.0.0" in str(not_hopper())


@pytest.mark.skipif(jax.__version_info__ < OLDEST_JAX, reason="AbstractDevice has no platform before jax 0.11")
@pytest.mark.parametrize(
    ("kind", "taken"),
    [(f"NVIDIA {HOPPER[0]} 80GB HBM3", True), ("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", False), ("cpu", False)],
)
def test_the_target_is_that_of_the_abstract_mesh(kind: str, taken: bool) -> None:
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        assert (not_hopper() is None) == taken
        assert multiprocessors(132) == 132


@pytest.mark.skipif(jax.__version_info__ < OLDEST_JAX, reason="no kernel to be traced before jax 0.11.2")
def test_within_a_checked_shard_map_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_entry, "not_hopper", lambda: None)
    mesh, by_head, whole = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",)), P(None, "x"), P()

    def attend(q: jax.Array, k: jax.Array, pool: jax.Array, *described: jax.Array) -> jax.Array:
        table, bounds, lens = described
        call = {"page_table": table, "cu_q_lens": bounds, "kv_lens": lens, "page_size": 16, "impl": "gpu"}
        return ragged_paged_attention(q, k, k, pool, **call)[0]

    split = jax.shard_map(
        attend, mesh=mesh, in_specs=(by_head, by_head, by_head, whole, whole, whole), out_specs=by_head
    )
    arrays = [jnp.zeros(shape, jnp.float16) for shape in ((3, 4, 64), (3, 2, 64), (32, 4, 64))]
    integers = [jnp.array(values, jnp.int32) for values in ([[1]], [0, 3], [3])]
    with pytest.raises(BackendUnsupported, match=r"varying over x; pass check_vma=False"):
        jax.jit(split).trace(*arrays, *integers)
