"""Each case plants one mistake in the text of a GPU kernel and proves that the checks notice."""

from __future__ import annotations

import importlib
import inspect

import pytest
from gpu_cases import NEEDS_MOSAIC, check, geometry, make_case

pytestmark = NEEDS_MOSAIC

# Rows of several chunks, so many that the blocks use every place of their rings anew; and tiles, whole and not.
DECODE = ([1, 1, 1, 1], [319, 30, 130, 300], 4)
SPLIT = ([1, 1, 1, 1], [319, 30, 130, 300], 16)
PREFILL = ([90, 1, 20, 3], [10, 40, 290, 200], 4)
HAND_BACK = "    plgpu.barrier_arrive(shared.ring.empty.at[slot])\n"
FILES = {"decode": "decode_chunks", "merge": "merge_chunks", "pages": "pages", "prefill": "prefill_tiles"}
# Name: the file by its key, what is replaced in it, by what, and the step.
MISTAKES = {
    "decode: a place handed back before its values are read": (
        "decode", "    state, weights = registers.weigh", HAND_BACK + "    state, weights = registers.weigh", DECODE
    ),
    "decode: keys that are not waited for": ("decode", "plgpu.barrier_wait(shared.ring.full.at[slot])", "pass", DECODE),
    "decode: steps dealt out without regard to those before": (
        "decode", "(me + done) % CONSUMERS", "jnp.int32(me)", DECODE
    ),
    "decode: the other's state not waited for": ("decode", "plgpu.barrier_wait(shared.handed)", "pass", DECODE),
    "decode: a key too many": ("decode", "column < high", "column <= high", DECODE),
    "decode: a result that is not awaited": (
        "decode", "    plgpu.wait_smem_to_gmem(0)\n    plgpu.barrier_arrive(shared.taken)",
        "    plgpu.barrier_arrive(shared.taken)", DECODE,
    ),
    "pages: values of dead slots not zeroed": ("pages", "(token >= low) & (token < high)", "token >= 0", DECODE),
    "prefill: a place handed back before its values are read": (
        "prefill", "    state, weights = registers.weigh", HAND_BACK + "    state, weights = registers.weigh", PREFILL
    ),
    "prefill: keys that are not waited for": (
        "prefill", "    plgpu.barrier_wait(shared.ring.full.at[slot])\n", "", PREFILL
    ),
    "prefill: a mask that is off by one": ("prefill", "behind >= 0", "behind > 0", PREFILL),
    "prefill: a row left unwritten": (
        "prefill", "jnp.clip(inputs.tiles.valid[tile] - skipped, 0, ROWS)",
        "jnp.clip(inputs.tiles.valid[tile] - skipped - 1, 0, ROWS)", PREFILL,
    ),
    "prefill: steps left out": ("prefill", "jnp.clip((position + 1) // width, whole, end)", "end", PREFILL),
    "merge: dead tokens left as they are": ("merge", "(token < start) | (token >= end)", "token < start", PREFILL),
    "merge: chunks added without their weights": (
        "merge", "across(weight, sizes.head_dim)", "across(weight * 0 + 1, sizes.head_dim)", SPLIT
    ),
}  # fmt: skip
FAST = ("decode: a place", "decode: keys", "decode: steps", "pages: values", "prefill: a place", "prefill: a mask")


def _cases() -> list[object]:
    return [
        pytest.param(*mistake, id=name, marks=() if name.startswith(FAST) else pytest.mark.slow)
        for name, mistake in MISTAKES.items()
    ]


@pytest.mark.parametrize(("name", "text", "mistake", "step"), _cases())
def test_it_is_noticed(name: str, text: str, mistake: str, step: tuple[list[int], list[int], int]) -> None:
    module = importlib.import_module(f"engine.attention.impl.gpu.kernel.{FILES[name]}")
    source = inspect.getsource(module)
    assert text in source, "the kernel no longer has what this test replaces"
    before = dict(module.__dict__)
    exec(compile(source.replace(text, mistake), module.__file__, "exec"), module.__dict__)
    q_lens, prefix_lens, blocks = step
    case = make_case(geometry(tokens=sum(q_lens) + 5), q_lens, prefix_lens, seed=7)
    try:
        with pytest.raises(Exception, match=r"RACE|race|not zero|not right|Not equal|[Bb]arrier"):
            check(case, blocks=blocks)
    finally:
        module.__dict__.update(before)


@pytest.mark.parametrize("step", [DECODE, SPLIT, PREFILL], ids=["decode", "split", "prefill"])
def test_without_a_mistake_the_same_steps_pass(step: tuple[list[int], list[int], int]) -> None:
    q_lens, prefix_lens, blocks = step
    check(make_case(geometry(tokens=sum(q_lens) + 5), q_lens, prefix_lens, seed=7), blocks=blocks)
