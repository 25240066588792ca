"""Memory and resources of a compiled program, and the cost of its kernels' loops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.bench.gpu.sass import Kernel, Loop
from engine.bench.tpu.hlo import launches, moves_of_at_least
from engine.errors import BackendUnsupported

ROWS = 64  # of a product: those of one warpgroup
WARPS = 4  # of a warpgroup


def footprint(compiled: Any, cache_bytes: int, kernels: Iterable[Kernel]) -> dict[str, Any]:
    """Memory, moves and launches of a compiled program over a donated cache, and the resources of each kernel."""
    memory = compiled.memory_analysis()
    text = compiled.as_text() or ""
    return {
        "cache bytes": cache_bytes,
        "temporary bytes": memory.temp_size_in_bytes,
        "alias bytes": memory.alias_size_in_bytes,
        "launches": launches(text),
        "moves": moves_of_at_least(text, cache_bytes // 2) if cache_bytes else [],
        "kernels": {
            kernel.name: {
                "registers": kernel.registers,
                "spilled bytes": kernel.spilled_bytes,
                "shared bytes": kernel.shared_bytes,
                "warnings": kernel.warnings,
            }
            for kernel in kernels
        },
    }


def decode_figures(kernel: Kernel, *, group: int, head_dim: int) -> dict[str, float]:
    """The cost of decode per KV token of one head: instructions that a warp issues, products, and page copies.

    Args:
        kernel: the decode kernel.
        group: query heads per KV head: the rows that count, of 64.
        head_dim: D.
    """
    hot = max(_loops(kernel, "HGMMA"), key=lambda loop: loop.instructions)
    (fetch,) = _loops(kernel, "UTMALDG")
    tokens = hot.flops / (4 * ROWS * head_dim)  # of context, a turn
    return {
        "decode instructions per step": hot.instructions,
        "decode instructions per KV token": hot.instructions / tokens,
        "decode FLOPs per instruction": hot.flops * group / ROWS / (WARPS * hot.instructions),
        "decode products per step": hot.counts["HGMMA"],
        "decode copies per step": fetch.counts["UTMALDG"],
        "decode spills in the loop": _spills(hot),
    }


def prefill_figures(kernel: Kernel) -> dict[str, float]:
    """The cost of prefill per step of 64 rows and 128 keys, without a mask and with one."""
    loops = sorted(_loops(kernel, "HGMMA"), key=lambda loop: loop.instructions)
    if len(loops) != 2:
        raise BackendUnsupported(f"{kernel.name} has {len(loops)} loops with products; expected two, one with a mask")
    plain, masked = loops
    fetches = _loops(kernel, "UTMALDG")
    return {
        "prefill instructions per step": plain.instructions,
        "prefill instructions per masked step": masked.instructions,
        "prefill FLOPs per instruction": plain.flops / (WARPS * plain.instructions),
        "prefill products per step": plain.counts["HGMMA"],
        "prefill copies per step": max(loop.counts["UTMALDG"] for loop in fetches),
        "prefill spills in the loop": _spills(plain) + _spills(masked),
    }


def _loops(kernel: Kernel, opcode: str) -> list[Loop]:
    found = kernel.innermost(opcode)
    if not found:
        raise BackendUnsupported(f"{kernel.name} has no loop with {opcode}: this compiler compiles it differently")
    return found


def _spills(loop: Loop) -> int:
    return loop.counts.get("LDL", 0) + loop.counts.get("STL", 0)
