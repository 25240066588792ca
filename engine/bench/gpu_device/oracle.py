"""Attention over separate K and V, in float64 with NumPy: the expected results for a device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


class Attended(NamedTuple):
    """The attention of some tokens.

    Attributes:
        out: ``[n, Hq, D]`` the output.
        lse: ``[n, Hq]`` the log of each denominator.
        spread: ``[n, Hq, D]`` the root of the sum of squares of the weighted values. Times the relative error of one
            weight it is the error of their sum, where the errors of the weights are independent.
    """

    out: Float64
    lse: Float64
    spread: Float64


def attend_row(
    q: npt.NDArray[Any],
    keys: npt.NDArray[Any],
    values: npt.NDArray[Any],
    *,
    sm_scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: npt.NDArray[Any] | None = None,
    k_scale: npt.NDArray[Any] | None = None,
    v_scale: npt.NDArray[Any] | None = None,
) -> Attended:
    """Attention of one sequence: its last ``n`` tokens attend causally to all of its ``L`` tokens.

    Args:
        q: ``[n, Hq, D]`` queries.
        keys: ``[L, H, D]`` as the cache stores them, those of the new tokens included.
        values: like ``keys``.
        sm_scale: factor on the logits.
        window: number of tokens that a query sees, itself included; None: all before it.
        soft_cap: logits ``s`` become ``soft_cap * tanh(s / soft_cap)``.
        sinks: ``[Hq]`` an extra logit per query head, in the denominator only.
        k_scale: ``[H]`` factors from cached keys to true keys; None is 1.
        v_scale: like ``k_scale``, for the values.
    """
    (n, q_heads, _), (length, kv_heads, _) = q.shape, keys.shape
    group = q_heads // kv_heads
    position = np.arange(length - n, length)[:, None]
    visible = np.arange(length) <= position
    if window is not None:
        visible &= np.arange(length) > position - window
    result = Attended(np.empty(q.shape), np.empty(q.shape[:2]), np.empty(q.shape))
    for head in range(q_heads):
        keys_of_head = _of_head(keys, head // group, k_scale)
        logits = q[:, head].astype(np.float64) @ keys_of_head.T * sm_scale
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        logits = np.where(visible, logits, -np.inf)
        sink = -np.inf if sinks is None else float(sinks[head])
        peak = np.maximum(logits.max(-1), sink)
        weights = np.exp(logits - peak[:, None])
        total = weights.sum(-1) + np.exp(sink - peak)
        weights /= total[:, None]
        values_of_head = _of_head(values, head // group, v_scale)
        result.out[:, head] = weights @ values_of_head
        result.spread[:, head] = np.sqrt(weights**2 @ values_of_head**2)
        result.lse[:, head] = peak + np.log(total)
    return result


def _of_head(rows: npt.NDArray[Any], head: int, scale: npt.NDArray[Any] | None) -> Float64:
    """``[L, D]`` true values of a KV head."""
    return rows[:, head].astype(np.float64) * (1.0 if scale is None else float(scale[head]))
