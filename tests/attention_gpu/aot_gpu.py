"""What the ahead-of-time tests share: when they are skipped, the shapes they compile, and what must hold of each."""

from __future__ import annotations

from typing import Any

import pytest

from engine.bench.gpu.toolchain import missing_compiler

NEEDS_COMPILER = [
    pytest.mark.aot,
    pytest.mark.timeout(900),
    pytest.mark.skipif(missing_compiler() is not None, reason=f"cannot compile for a GPU: {missing_compiler()}"),
]
SHARED_BYTES = 232_448  # of one block on Hopper
PROGRAMS = "engine.bench.gpu.programs"


def shape(target: str = "h100", *, decode: bool = False, **changes: Any) -> dict[str, Any]:
    """A step of 32 sequences: a decode row each, or 1,024 new tokens together."""
    sizes = {"page_size": 16, "q_heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "context": 4096}
    return {"target": target, "tokens": 32 if decode else 1024, "batch": 32, **sizes, **changes}


def check_footprint(found: dict[str, Any], *, most_temporary: int | None = None) -> None:
    """In place, nothing of the cache's size moved, no register spilled, nothing that the assembler warns of."""
    most_temporary = most_temporary or found["cache bytes"] // 10
    assert "failed" not in found, found["failed"]
    assert found["alias bytes"] == found["cache bytes"], "the cache does not alias"
    assert found["moves"] == [], "the cache is moved"
    assert found["temporary bytes"] <= most_temporary, "temporaries of the cache's size"
    assert found["kernels"], "no kernel"
    for name, kernel in found["kernels"].items():
        assert kernel["spilled bytes"] == 0, name
        assert kernel["warnings"] == [], name
        assert kernel["registers"] <= 168, name
        assert kernel["shared bytes"] <= SHARED_BYTES, name
