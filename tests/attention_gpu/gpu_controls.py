"""Programs that the checks of compiled ones must refuse; compiled in the process that compiles ahead of time."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from engine.attention.impl.gpu.kernel.prefill_tiles import prefill_tiles
from engine.attention.impl.gpu.kernel.sizes import Sizes
from engine.attention.impl.gpu.work import Tiles
from engine.bench.gpu.figures import footprint
from engine.bench.gpu.programs import _Target, fresh_kernels
from engine.kv.scatter_gpu import scatter_gpu


def compile_wide_steps() -> dict[str, Any]:
    """Prefill by steps of 256 keys, whose logits alone fill half of the registers."""
    at = _Target("h100")
    sizes = Sizes(8, 4, 128, 16, jnp.dtype("bfloat16"), 132, prefill_tokens=256, prefill_stages=1)
    ints = [at.like((16,), jnp.int32)] * 5 + [at.like((1,), jnp.int32)]
    floats = [at.like((heads,), jnp.float32) for heads in (8, 8, 32)]
    arrays = [at.like((1024, 32, 128), jnp.bfloat16), at.like((4096, 8, 256), jnp.bfloat16)]
    table = at.like((4, 272), jnp.int32)

    def program(unused: Any, q: Any, kv: Any, table: Any, floats: Any, ints: Any) -> Any:
        return prefill_tiles(sizes, q, kv, table, *floats, Tiles(*ints), interpret=False)

    compiled = at.compile(program, at.like((1,), jnp.int32), *arrays, table, floats, ints)
    return footprint(compiled, 0, fresh_kernels()) | {"temporary bytes": 0}


def compile_undonated_scatter() -> dict[str, Any]:
    """A scatter into a cache that the caller keeps: it must be copied."""
    at = _Target("h100")
    cache, new = at.like((4096, 16, 128), jnp.bfloat16), at.like((32, 8, 128), jnp.bfloat16)

    def program(unused: Any, cache: Any, loc: Any, new: Any) -> Any:
        return scatter_gpu(cache, loc, None, new, new)

    compiled = at.compile(program, at.like((1,), jnp.int32), cache, at.like((32,), jnp.int32), new)
    return footprint(compiled, 4096 * 16 * 128 * 2, fresh_kernels())
