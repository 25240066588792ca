"""The static sizes of a call, and how registers are divided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Ref = Any  # a Pallas memory reference; jax has no public type for it
ROWS = 64  # query rows of one wgmma, its minimum
# Registers per thread. Each warpgroup starts with 168; the two consumers take what the producer gives back.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 56, 224


@dataclass(frozen=True)
class Sizes:
    """What a call is compiled for.

    Attributes:
        heads: KV heads H.
        group: query heads per KV head, G.
        head_dim: D, 64 or 128.
        page_size: tokens per page.
        dtype: dtype of q and of the cache.
        blocks: thread blocks that run at once: the number of streaming multiprocessors.
        decode_tokens: context tokens per step of the decode loop.
        decode_stages: steps that each of the two decode consumers has in shared memory.
        prefill_tokens: context tokens per step of the prefill loop.
        prefill_stages: steps of the prefill loop in shared memory.
        window: tokens that a query sees; None sees all.
        soft_cap: None leaves the logits.
        has_sinks: whether each head has an extra logit.
        interpret: whether the kernels run in the interpreter, which lacks some of the compiler's operations.
    """

    heads: int
    group: int
    head_dim: int
    page_size: int
    dtype: np.dtype
    blocks: int
    decode_tokens: int = 64
    decode_stages: int = 2
    prefill_tokens: int = 128
    prefill_stages: int = 2
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    interpret: bool = False

    @property
    def group_rows(self) -> int:
        """Rows of one KV head's group in a tile of queries: at least 8, and a divisor of the tile."""
        return max(8, 1 << (self.group - 1).bit_length())

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk's results: the groups of all heads."""
        return self.heads * self.group_rows

    @property
    def tiled_rows(self) -> int:
        """``chunk_rows`` rounded up to whole tiles."""
        return -(-self.chunk_rows // ROWS) * ROWS

    @property
    def shares_head(self) -> bool:
        """Whether the two consumers of a prefill block take heads of one group; else they take neighbouring tokens."""
        return self.group % 2 == 0

    @property
    def tile_tokens(self) -> int:
        """New tokens that a prefill block attends."""
        return ROWS if self.shares_head else 2 * ROWS

    def run_tokens(self, tokens: int) -> int:
        """Tokens of one copy into a step of ``tokens``: the largest run that divides both page and step."""
        return math.gcd(self.page_size, tokens)
