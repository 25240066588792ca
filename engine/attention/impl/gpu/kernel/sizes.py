"""The static sizes of a call, and how registers are shared out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Ref = Any  # a Pallas memory reference; jax has no public type for it
ROWS = 64  # query rows of one wgmma, the least there are
# A thread of each warpgroup gets 168 at first; what the producer gives back the two consumers take.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 56, 224


@dataclass(frozen=True)
class Sizes:
    """What a call is compiled for.

    Attributes:
        heads: KV heads H.
        group: query heads per KV head, G.
        head_dim: D, 64 or 128.
        page_size: tokens a page.
        dtype: of q and of the cache.
        blocks: thread blocks that run at once: the streaming multiprocessors.
        decode_tokens: context tokens of one step of the decode loop.
        decode_stages: of these steps, how many each of the two consumers has in shared memory.
        prefill_tokens: context tokens of one step of the prefill loop.
        prefill_stages: of these steps, how many are in shared memory.
        window: tokens a query sees; None sees all.
        soft_cap: None leaves the logits.
        has_sinks: whether each head has an extra logit.
        interpret: whether the kernels run in the interpreter, which knows less than the compiler.
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
        """Rows of one KV head's group in a tile of queries: whole cores of 8 rows, and whole groups in a tile."""
        return max(8, 1 << (self.group - 1).bit_length())

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk's results: all heads' groups."""
        return self.heads * self.group_rows

    @property
    def tiled_rows(self) -> int:
        """The same in whole tiles."""
        return -(-self.chunk_rows // ROWS) * ROWS

    @property
    def shares_head(self) -> bool:
        """Whether both consumers of a prefill block take heads of one group; else they take neighbouring tokens."""
        return self.group % 2 == 0

    @property
    def tile_tokens(self) -> int:
        """New tokens that a prefill block attends."""
        return ROWS if self.shares_head else 2 * ROWS

    def run_tokens(self, tokens: int) -> int:
        """Tokens of one copy into a step of ``tokens``: a page, or what of it and the step coincide."""
        return math.gcd(self.page_size, tokens)
