"""The object that a model calls: attention with a layer's options, bound once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from engine.attention.call import attend
from engine.attention.checks import check_options
from engine.attention.impl.implementation import AttentionResult
from engine.attention.metadata import AttentionMetadata
from engine.attention.options import AttentionOptions, HeadArrays, scale_or_default
from engine.errors import ConfigError, ShapeError
from engine.kv.narrow import Buffer


@dataclass(frozen=True, kw_only=True)
class FlashAttentionBackend:
    """Attention over the fused, paged cache with fixed options; hashable, holds no array, shared by all layers.

    A layer with another window takes ``dataclasses.replace(backend, sliding_window=w)``.

    Attributes:
        page_size: tokens per page.
        num_q_heads: Hq, a multiple of ``num_kv_heads``.
        num_kv_heads: H.
        head_dim: D.
        sm_scale: factor on the logits; None is ``head_dim ** -0.5``.
        sliding_window: tokens that a query sees, itself included; None sees all before it.
        soft_cap: logits ``s`` become ``soft_cap * tanh(s / soft_cap)``; None leaves them.
        impl: "auto", "reference", "xla", "cpu", "tpu" or "gpu".
    """

    page_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sm_scale: float | None = None
    sliding_window: int | None = None
    soft_cap: float | None = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        """Checks the options; raises ConfigError."""
        check_options(
            page_size=self.page_size,
            sm_scale=self.sm_scale,
            sliding_window=self.sliding_window,
            soft_cap=self.soft_cap,
        )
        counts = (self.num_q_heads, self.num_kv_heads, self.head_dim)
        if min(counts) < 1 or self.num_q_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_q_heads={counts[0]}, num_kv_heads={counts[1]}, head_dim={counts[2]} must be positive, and "
                "num_kv_heads must divide num_q_heads"
            )

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        fused_kv: Buffer,
        metadata: AttentionMetadata,
        *,
        sinks: jax.Array | None = None,
        k_scale: jax.Array | None = None,
        v_scale: jax.Array | None = None,
        return_lse: bool = False,
    ) -> tuple[Any, ...]:
        """Writes one layer's new keys and values at ``metadata.out_cache_loc``, then attends.

        Args:
            q: ``[T, Hq, D]`` queries.
            k: ``[T, H, D]`` new keys, in q's dtype.
            v: ``[T, H, D]`` new values.
            fused_kv: ``[S, 2H, D]`` the layer's buffer, or its padded storage, or a ``NarrowKV``.
            metadata: the sequences of the step.
            sinks: ``[Hq]`` an extra logit per query head that joins the softmax denominator only.
            k_scale: ``[H]`` float32, above 0: the cache holds keys divided by it; None is 1.
            v_scale: as ``k_scale``, for the values.
            return_lse: whether to return the log-sum-exp of each row too.

        Returns:
            ``out[T, Hq, D]`` in q's dtype, zero in padding; the written buffer; and with ``return_lse`` the natural
            log of each softmax's denominator, ``[T, Hq]`` float32, sinks included, minus infinity in padding. A row
            that sees no key has output 0 and, without a sink, minus infinity.

        Raises:
            ShapeError: an array has the wrong shape, dtype or (where concrete) contents.
            BackendUnsupported: the implementation that ``impl`` names, or with "auto" each of them, cannot do this.
        """
        heads = HeadArrays(sinks, k_scale, v_scale)
        return self.attend(q, k, v, fused_kv, metadata, heads, return_lse=return_lse).plain()

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        fused_kv: Buffer,
        metadata: AttentionMetadata,
        heads: HeadArrays,
        *,
        return_lse: bool = False,
    ) -> AttentionResult:
        """As a call, with the arrays per head in one and a named result: for the rest of this room."""
        if q.shape[1:] != (self.num_q_heads, self.head_dim) or k.shape[1:] != (self.num_kv_heads, self.head_dim):
            raise ShapeError(
                f"q has shape {q.shape} and k {k.shape}; this backend was made for {self.num_q_heads} query heads and "
                f"{self.num_kv_heads} KV heads of {self.head_dim}"
            )
        scale = scale_or_default(self.sm_scale, self.head_dim)
        options = AttentionOptions(self.page_size, scale, self.sliding_window, self.soft_cap, return_lse)
        return attend(q, k, v, fused_kv, metadata, heads=heads, options=options, impl=self.impl)
