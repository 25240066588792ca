"""A consumer's work on a tile in registers: two matrix products and the online softmax between them.

Logits stay as the product gives them; a factor makes exponents of 2 of them (FlashAttention-2, -3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engine.attention.impl.gpu.kernel.sizes import ROWS, Ref, Sizes

NOTHING = -1e30  # a peak below every logit, yet finite: minus infinity less itself is NaN
LOG2_E = 1.4426950408889634
OPTIONS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
BY_ROW = plgpu.Layout.WGMMA.reduce(1)


class Softmax(NamedTuple):
    """Online softmax of 64 query rows, float32.

    Attributes:
        acc: ``[64, D]`` sum of weighted values.
        peak: ``[64]`` largest logit so far, as an exponent of 2.
        total: ``[64]`` sum of weights.
    """

    acc: jax.Array
    peak: jax.Array
    total: jax.Array


def by_row(value: Any) -> Any:
    """``value`` in each of 64 rows."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), BY_ROW)


def across(rows: jax.Array, columns: int) -> jax.Array:
    """``[64]`` repeated over columns."""
    return lax.broadcast_in_dim(rows, (ROWS, columns), [0])


def start(sizes: Sizes, peak: Any = NOTHING, total: Any = 0.0) -> Softmax:
    """The state before any key; a sink is a logit without a value, and counts as if it had come first."""
    acc = plgpu.layout_cast(jnp.zeros((ROWS, sizes.head_dim), jnp.float32), plgpu.Layout.WGMMA)
    return Softmax(acc, by_row(peak), by_row(total))


def logits_of(sizes: Sizes, q_ref: Ref, k_ref: Ref, then: Callable[[], None] = lambda: None) -> Any:
    """``q[64, D] @ k[N, D].T`` in float32; ``then`` runs once the product is issued."""
    if sizes.interpret:  # the race detector does not see what a wgmma reads; it sees a plain load
        product = jnp.dot(q_ref[...], k_ref[...].T, preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        then()
        return product

    def multiply(acc_ref: Ref) -> Any:
        plgpu.wgmma(acc_ref, q_ref, k_ref.transpose((1, 0)))
        then()
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, k_ref.shape[0]), jnp.float32))


def add_values(sizes: Sizes, acc: jax.Array, weights: jax.Array, v_ref: Ref) -> Any:
    """``acc + weights[64, N] @ v[N, D]``, the weights from registers."""
    if sizes.interpret:
        product = acc + jnp.dot(weights, v_ref[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        return product
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, weights, v_ref))(plgpu.ACC.init(acc))


def capped(sizes: Sizes, logits: jax.Array, factor: jax.Array) -> tuple[jax.Array, Any]:
    """Logits under the soft cap, and the factor that makes exponents of 2 of them."""
    if sizes.soft_cap is None:
        return logits, factor
    # tanh(x) = 1 - 2 / (e^2x + 1): the hardware's tanh has 11 bits, and its division takes eight instructions.
    doubled = jnp.exp2(logits * (factor * (2 / sizes.soft_cap)))
    inverse = jnp.exp2(jnp.log(doubled + 1) * -LOG2_E)
    return 1 - 2 * inverse, jnp.float32(sizes.soft_cap * LOG2_E)


def weigh(state: Softmax, logits: jax.Array, factor: Any) -> tuple[Softmax, jax.Array]:
    """Updates the state by a tile's logits, without their values; also returns the weights, float32."""
    peak = jnp.maximum(state.peak, logits.max(axis=1) * factor)
    decay = jnp.exp2(state.peak - peak)
    weights = jnp.exp2(logits * factor - across(peak, logits.shape[1]))
    acc = state.acc * across(decay, state.acc.shape[1])
    return Softmax(acc, peak, state.total * decay + weights.sum(axis=1)), weights


def iota(shape: tuple[int, ...], axis: int) -> Any:
    """Row or column numbers in the layout of a product."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
