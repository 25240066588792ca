"""What an implementation of attention is: a pure function of one signature, and what it leaves to the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from engine.attention.metadata import AttentionMetadata
from engine.attention.options import AttentionOptions, HeadArrays
from engine.kv.narrow import Buffer


class AttentionResult(NamedTuple):
    """What attention returns; public calls return it as a plain tuple.

    Attributes:
        out: ``[T, Hq, D]``, zero for tokens that belong to no sequence.
        fused_kv: the layer's buffer, the new keys and values in it; a ``NarrowKV`` where it is narrow.
        lse: ``[T, Hq]`` float32 natural log of each softmax's denominator; None unless the options ask for it.
    """

    out: jax.Array
    fused_kv: Buffer
    lse: jax.Array | None = None

    def plain(self) -> tuple[Any, ...]:
        """``(out, fused_kv)``, and ``lse`` as the third where there is one."""
        return (self.out, self.fused_kv) if self.lse is None else (self.out, self.fused_kv, self.lse)


Attend = Callable[
    [jax.Array, jax.Array, jax.Array, Buffer, AttentionMetadata, HeadArrays, AttentionOptions], AttentionResult
]


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    Attributes:
        attend: ``(q, k, v, fused_kv, metadata, heads, options) -> AttentionResult``, of checked arrays with the shapes
            of ``ragged_paged_attention``. Raises BackendUnsupported for what it cannot do.
        fuses_write: whether ``attend`` writes k and v and applies the scales of ``heads`` itself; its ``out`` then has
            q's dtype. Otherwise the caller has done both: q comes scaled (and rotated where the keys are) and the cache
            written, ``attend`` reads only the shape of k and v, and returns ``out`` in float32, a mean of values as the
            cache stores them.
    """

    attend: Attend
    fuses_write: bool = False
