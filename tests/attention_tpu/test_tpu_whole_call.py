"""The whole call, as compiled: q is read and out written once, by the kernel, and little else runs around it."""

import pytest
from aot_support import NEEDS_LIBTPU, shape

from engine.bench.tpu.aot import compile_each
from engine.bench.tpu_static import OURS

pytestmark = NEEDS_LIBTPU

ONE_SHARD_OF_FOUR = {"q_heads": 8, "kv_heads": 2}
ONE_SHARD_OF_EIGHT = {"q_heads": 8, "kv_heads": 1}


def call(gen, tokens, *, decode, **heads):
    """Up to 256 sequences that decode, the other tokens dead, or four that share as many new tokens."""
    batch = min(tokens, 256) if decode else 4
    return shape(gen, **heads) | {"tokens": tokens, "batch": batch, "context": 2048 if decode else 8192}


def check_all(cases):
    results = list(compile_each(OURS, cases))
    assert len(results) == len(cases)
    for case, found in zip(cases, results, strict=True):
        assert "failed" not in found, f"{case}: {found['failed']}"
        assert found["temporary bytes"] <= found["query bytes"] / 20, case
        assert found["query moves"] == found["moves"] == [], case
        # A page table of few columns lies transposed in memory and is copied; so is its mask, where the rows are many.
        assert found["programs around the kernel"] <= (10 if case["batch"] <= 64 else 12), case


def test_no_array_of_the_size_of_q_is_made():
    check_all(
        [
            call("v6e", 64, decode=True) | {"context": 4096},
            call("v6e", 256, decode=True),
            call("v7x", 4096, decode=False),
            call("v5e", 256, decode=False, **ONE_SHARD_OF_EIGHT),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("gen", ["v5e", "v6e", "v7x"])
def test_no_array_of_the_size_of_q_is_made_in_any_step(gen, decode):
    check_all(
        [
            call(gen, tokens, decode=decode, **heads)
            for tokens in (256, 512, 1024, 2048, 4096)
            for heads in ({}, ONE_SHARD_OF_FOUR, ONE_SHARD_OF_EIGHT)
        ]
    )


def test_a_head_dim_that_is_padded_shows_what_the_check_looks_for():
    """XLA lays q of 64 lanes out in another order than the kernel reads."""
    (found,) = compile_each(OURS, [call("v6e", 1024, decode=False, q_heads=64, head_dim=64)])
    assert found["query moves"]
