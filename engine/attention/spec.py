"""The static half of an attention call: what is compiled in, the same for every step of a layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """Options of a layer, hashable, so that they may be a static argument of a compiled program.

    Attributes:
        page_size: tokens a page.
        sm_scale: factor on the logits.
        sliding_window: tokens a query sees, itself included; None sees all before it.
        soft_cap: logits ``s`` become ``soft_cap * tanh(s / soft_cap)``; None leaves them.
    """

    page_size: int
    sm_scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None
