"""The GPU's scatter in the interpreter: every bit of the buffer, and mistakes noticed."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gpu_cases import NEEDS_MOSAIC

from engine.kv.scatter import last_of_equal

pytestmark = NEEDS_MOSAIC

SLOTS = 64


def step(tokens: int, heads: int, head_dim: int, dtype: Any) -> tuple[Any, ...]:
    """A buffer whose every byte is drawn, so NaN payloads are among them; slots, some dropped; keys and values."""
    rng = np.random.default_rng()
    width = np.dtype(dtype).itemsize

    def drawn(*shape: int) -> Any:
        return rng.integers(0, 256, (*shape[:-1], shape[-1] * width), np.uint8).view(dtype)

    slots = np.where(rng.random(tokens) < 0.7, rng.permutation(SLOTS)[:tokens], rng.choice([-1, -9, SLOTS, 1 << 20]))
    return drawn(SLOTS, 2 * heads, head_dim), slots.astype(np.int32), drawn(tokens, heads, head_dim), drawn(
        tokens, heads, head_dim
    )  # fmt: skip


def expected(fused: Any, slots: Any, k: Any, v: Any) -> Any:
    fused = fused.copy()
    for token, slot in enumerate(slots):
        if 0 <= slot < SLOTS:
            for head in range(k.shape[1]):
                fused[slot, 2 * head], fused[slot, 2 * head + 1] = k[token, head], v[token, head]
    return fused


def run(fused: Any, slots: Any, tokens: Any, k: Any, v: Any) -> Any:
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from engine.kv import scatter_gpu

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            interpret = plgpu.InterpretGPUParams(detect_races=True)
            arrays = [None if array is None else jnp.asarray(array) for array in (fused, slots, tokens, k, v)]
            found = np.asarray(scatter_gpu.scatter_gpu(*arrays, interpret=interpret))
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()
    assert "RACE" not in printed.getvalue(), printed.getvalue()
    return found


def check(fused: Any, slots: Any, k: Any, v: Any, *, tokens: Any = None, order: Any = None) -> None:
    found = run(fused, slots if order is None else order, tokens, k, v)
    assert found.tobytes() == expected(fused, slots, k, v).tobytes(), "the buffer is not right"


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "dtype"),
    [
        (0, 2, 64, ml_dtypes.bfloat16),
        (1, 1, 64, ml_dtypes.bfloat16),
        (13, 8, 128, ml_dtypes.bfloat16),
        (9, 2, 80, np.float16),
        (5, 3, 4, np.float32),
        (7, 2, 256, np.float32),
        (11, 1, 16, ml_dtypes.float8_e4m3fn),
    ],
)
@pytest.mark.parametrize("blocks", [1, 264])
def test_rows_land_in_their_slots(
    tokens: int, heads: int, head_dim: int, dtype: Any, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.kv import scatter_gpu

    monkeypatch.setattr(scatter_gpu, "BLOCKS", blocks)  # few blocks: several tokens each, and the last not full
    assert scatter_gpu.rows_are_copied(heads, head_dim, dtype)
    check(*step(tokens, heads, head_dim, dtype))


def test_of_equal_slots_the_last_wins() -> None:
    fused, _, k, v = step(6, 2, 64, ml_dtypes.bfloat16)
    slots = np.array([3, -1, 3, 40, 3, 40], np.int32)
    order, tokens = last_of_equal(jnp.asarray(slots))
    check(fused, slots, k, v, tokens=tokens, order=order)


def test_rows_of_no_whole_units_are_left_to_xla() -> None:
    from engine.kv.scatter_gpu import rows_are_copied

    assert not rows_are_copied(2, 12, np.float16)
    assert not rows_are_copied(2, 512, np.float16)
    assert not rows_are_copied(256, 256, np.float32)


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("@pl.when(slot >= 0)", "@pl.when(slot >= -1)"),
        ("        plgpu.wait_smem_to_gmem(0)\n", ""),
        ("        plgpu.barrier_wait(arrived)\n", ""),
        ("cache_ref.at[slot, :, half]", "cache_ref.at[slot, :, 1 - half]"),
    ],
)
def test_a_mistake_is_noticed(text: str, mistake: str) -> None:
    module = importlib.import_module("engine.kv.scatter_gpu")
    source, before = inspect.getsource(module), dict(module.__dict__)
    assert text in source, "the kernel no longer has what this test replaces"
    fused, slots, k, v = step(9, 2, 64, ml_dtypes.bfloat16)
    slots[4] = -1  # drawn slots may all be kept, or dropped by other numbers
    exec(compile(source.replace(text, mistake), module.__file__, "exec"), module.__dict__)
    try:
        with pytest.raises(Exception, match=r"RACE|not right|[Bb]arrier|bounds|wait"):
            check(fused, slots, k, v)
    finally:
        module.__dict__.update(before)
