"""What the ahead-of-time tests share: when they are skipped, and the shapes that they compile."""

import pytest

from engine.bench.tpu.libtpu import missing_compiler

NEEDS_LIBTPU = [
    pytest.mark.aot,
    pytest.mark.timeout(1800),  # several compiles a test: a minute of work, many on a busy machine
    pytest.mark.skipif(missing_compiler() is not None, reason=f"cannot compile for a TPU: {missing_compiler()}"),
]
VMEM_BYTES = {"v5e": 128 << 20, "v6e": 128 << 20, "v7x": 64 << 20}


def shape(gen, dtype="bfloat16", *, q_heads=32, kv_heads=8, head_dim=128, page_size=128, window=None, decode=False):
    """A step of 32 sequences: a decode row each, or 1,024 new tokens together."""
    return {
        "gen": gen,
        "dtype": dtype,
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "page_size": page_size,
        "window": window,
        "tokens": 32 if decode else 1024,
        "batch": 32,
        "context": 4096,
    }
