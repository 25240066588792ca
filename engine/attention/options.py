"""What is the same for every step of a layer: the options that are compiled in, and its arrays a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class AttentionOptions:
    """Options of a layer, hashable, so that they may be a static argument of a compiled program.

    Attributes:
        page_size: tokens a page.
        sm_scale: factor on the logits.
        sliding_window: tokens a query sees, itself included; None sees all before it.
        soft_cap: logits ``s`` become ``soft_cap * tanh(s / soft_cap)``; None leaves them.
        return_lse: whether the log-sum-exp of each row is wanted too.
    """

    page_size: int
    sm_scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None
    return_lse: bool = False


class HeadArrays(NamedTuple):
    """A layer's runtime arrays, so that one program serves every layer; None where there are none.

    Attributes:
        sinks: ``[Hq]`` an extra logit per query head that joins the softmax denominator only.
        k_scale: ``[H]`` float32; the cache holds keys divided by it.
        v_scale: ``[H]`` float32; the cache holds values divided by it.
        logit_scale: a scalar factor on the logits, beside the options's.
    """

    sinks: jax.Array | None = None
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    logit_scale: jax.Array | None = None

    def scale(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Takes factors into ``q[T, Hq, D]`` and scales out of ``k, v[T, H, D]``; in float32 where there are any.

        Attention over the cache as it is stored then gives the logits of the true keys. Multiplies by the reciprocal,
        as XLA would make of a division, so that the bits stored are the same in every backend.
        """
        if self.logit_scale is not None:
            q = q.astype(jnp.float32) * self.logit_scale.astype(jnp.float32)
        if self.k_scale is not None:
            q, k = q * _rows(self.k_scale, q.shape[1]), k * _rows(1 / self.k_scale, k.shape[1])
        return q, k, v if self.v_scale is None else v * _rows(1 / self.v_scale, v.shape[1])

    def unscale(self, out: jax.Array) -> jax.Array:
        """Brings ``out[T, Hq, D]``, a mean of stored values, to the true ones; in float32 where there is a scale."""
        return out if self.v_scale is None else out * _rows(self.v_scale, out.shape[1])


def _rows(scale: jax.Array, heads: int) -> jax.Array:
    """``[H]`` as ``[1, heads, 1]`` float32, each repeated for its group."""
    return jnp.repeat(jnp.asarray(scale, jnp.float32), heads // scale.shape[0])[None, :, None]
