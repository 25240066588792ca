"""The shape of a step: its sequences with their numbers of new tokens and context lengths."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Shape:
    """A step of attention over one layer's cache.

    Attributes:
        rows: groups of equal sequences, each (sequences, new tokens, tokens of context including the new ones).
        page_size: tokens per page.
        q_heads: query heads.
        kv_heads: KV heads.
        head_dim: elements per head.
        dtype: dtype of q, k, v and the cache.
    """

    rows: tuple[tuple[int, int, int], ...]
    page_size: int = 16
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"

    @classmethod
    def of(cls, values: dict[str, Any]) -> Shape:
        """The shape whose ``values`` these are, also after a round trip through JSON."""
        return cls(**values | {"rows": tuple((int(n), int(new), int(length)) for n, new, length in values["rows"])})

    def values(self) -> dict[str, Any]:
        """Its fields as plain values."""
        return asdict(self)

    @property
    def name(self) -> str:
        """Its name, such as ``32 x 1 of 2048``."""
        return " + ".join(f"{n} x {new} of {length}" for n, new, length in self.rows)

    @property
    def q_lens(self) -> npt.NDArray[np.int64]:
        """``[B]`` new tokens of each sequence."""
        return np.repeat([new for _, new, _ in self.rows], [n for n, _, _ in self.rows])

    @property
    def kv_lens(self) -> npt.NDArray[np.int64]:
        """``[B]`` tokens of context of each sequence, the new ones included."""
        return np.repeat([length for _, _, length in self.rows], [n for n, _, _ in self.rows])

    @property
    def tokens(self) -> int:
        """New tokens of the step."""
        return int(self.q_lens.sum())

    @property
    def itemsize(self) -> int:
        """Bytes per element; bfloat16 is a dtype of ml_dtypes."""
        return np.dtype(getattr(ml_dtypes, self.dtype, self.dtype)).itemsize

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that must be read once."""
        return int(self.kv_lens.sum()) * 2 * self.kv_heads * self.head_dim * self.itemsize

    @property
    def flops(self) -> int:
        """FLOPs of both products over the visible pairs of query and key: 4 per pair, head and element."""
        pairs = int((self.q_lens * (self.kv_lens - self.q_lens) + self.q_lens * (self.q_lens + 1) // 2).sum())
        return 4 * self.head_dim * self.q_heads * pairs

    def page_table(self, pages: int, seed: int = 0) -> npt.NDArray[np.int32]:
        """``[B, P]`` page ids of each sequence, in random order from a pool of ``pages`` pages, never page 0."""
        counts = -(-self.kv_lens // self.page_size)
        drawn = 1 + np.random.default_rng(seed).permutation(pages - 1)[: counts.sum()]
        table = np.zeros((len(counts), counts.max()), np.int32)
        table[np.arange(counts.max()) < counts[:, None]] = drawn
        return table
