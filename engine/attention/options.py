"""What is fixed for a layer: the options that are compiled in, and its arrays per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class AttentionOptions:
    """Options of a layer; hashable, so that they can be a static argument of a compiled program.

    Attributes:
        page_size: tokens per page.
        sm_scale: factor on the logits.
        sliding_window: tokens that a query sees, itself included; None sees all before it.
        soft_cap: logits ``s`` become ``soft_cap * tanh(s / soft_cap)``; None leaves them.
        return_lse: whether the log-sum-exp of each row is wanted too.
    """

    page_size: int
    sm_scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None
    return_lse: bool = False


def scale_or_default(sm_scale: float | jax.Array | None, head_dim: int) -> float:
    """``sm_scale`` as a Python float; ``head_dim ** -0.5`` where it is None."""
    return head_dim**-0.5 if sm_scale is None else float(sm_scale)


class HeadArrays(NamedTuple):
    """A layer's runtime arrays, so that one program serves every layer; None where a layer has none.

    Attributes:
        sinks: ``[Hq]`` an extra logit per query head that joins the softmax denominator only.
        k_scale: ``[H]`` float32; the cache holds keys divided by it.
        v_scale: ``[H]`` float32; the cache holds values divided by it.
        logit_scale: a scalar factor on the logits, beside that of the options.
    """

    sinks: jax.Array | None = None
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    logit_scale: jax.Array | None = None

    def scale_queries(self, q: jax.Array) -> jax.Array:
        """Multiplies ``q[T, Hq, D]`` by the factors on its logits; in float32 where there are any.

        Attention over keys as the cache stores them then gives the logits of the true keys.
        """
        if self.logit_scale is not None:
            q = q.astype(jnp.float32) * self.logit_scale.astype(jnp.float32)
        return q if self.k_scale is None else q * _rows(self.k_scale, q.shape[1])

    def scale_kv(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Divides new ``k, v[T, H, D]`` by their scales; both in float32 where there is a scale.

        Multiplies by the reciprocal, as XLA would make of a division, so that every implementation stores the same
        bits.
        """
        if self.k_scale is None and self.v_scale is None:
            return k, v
        k, v = (half.astype(jnp.promote_types(half.dtype, jnp.float32)) for half in (k, v))
        k = k if self.k_scale is None else k * _rows(1 / self.k_scale, k.shape[1])
        return k, v if self.v_scale is None else v * _rows(1 / self.v_scale, v.shape[1])

    def unscale(self, out: jax.Array) -> jax.Array:
        """Brings ``out[T, Hq, D]``, a mean of stored values, to the true ones; in float32 where there is a scale."""
        return out if self.v_scale is None else out * _rows(self.v_scale, out.shape[1])


def _rows(scale: jax.Array, heads: int) -> jax.Array:
    """``[H]`` as ``[1, heads, 1]`` float32, each repeated for its group."""
    return jnp.repeat(jnp.asarray(scale, jnp.float32), heads // scale.shape[0])[None, :, None]
