"""Weights in MXFP4 (OCP Microscaling 1.0), as gpt-oss publishes its experts: read as bfloat16, which is exact.

Of a weight ``[E, inputs, outputs]`` the file has the 4-bit numbers of 32 neighbouring inputs as 16 bytes, the earlier
of two in the lower half, in ``*_blocks`` (``[E, outputs, inputs / 32, 16]``), and in ``*_scales`` the exponent that
they share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError
from engine.models.tensor_files import BLOCKS, SCALES, StoredTensor

_BLOCK = 32  # numbers that share a scale
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of the three bits below the sign: E2M1
_NUMBERS = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_PAIRS = np.stack([_NUMBERS[np.arange(256) % 16], _NUMBERS[np.arange(256) // 16]], axis=-1)  # of each byte
# E8M0: powers of two, and NaN.
_POWERS = np.append(np.float32(2) ** np.arange(-127, 128, dtype=np.float32), np.float32(np.nan))


@dataclass(frozen=True)
class PackedTensor:
    """A weight of all experts, ``[E, inputs, outputs]``, stored in MXFP4.

    Attributes:
        name: the weight's name without the suffixes of its two parts.
        blocks: uint8 ``[E, outputs, inputs / 32, 16]``.
        scales: uint8 ``[E, outputs, inputs / 32]``.
    """

    name: str
    blocks: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """``(E, inputs, outputs)``."""
        experts, outputs, blocks = self.scales.shape
        return experts, blocks * _BLOCK, outputs

    def read(self, index: tuple[slice, ...] = ()) -> NDArray[Any]:
        """Reads the weight, or a part of it, as bfloat16; only the blocks of that part are read.

        Args:
            index: a slice for each of the leading axes.
        """
        experts, inputs, outputs = (*index, *(slice(None),) * 3)[:3]
        start, stop, _ = inputs.indices(self.shape[1])
        first, last = start // _BLOCK, -(-stop // _BLOCK)
        where = experts, outputs, slice(first, last)
        blocks, scales = self.blocks.read(where), self.scales.read(where)
        numbers = np.empty((*scales.shape[:2], (last - first) * _BLOCK), jnp.bfloat16)
        for expert, (packed, exponents) in enumerate(zip(blocks, scales, strict=True)):
            numbers[expert] = decoded(packed, exponents)
        return numbers[..., start - first * _BLOCK : stop - first * _BLOCK].swapaxes(1, 2)


def decoded(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The numbers of MXFP4 blocks.

    Args:
        blocks: uint8 ``[..., B, 16]``.
        scales: uint8 ``[..., B]``.

    Returns:
        float32 ``[..., B * 32]``.
    """
    numbers = _PAIRS[blocks] * _POWERS[scales][..., None, None]
    unpacked: NDArray[np.float32] = numbers.reshape(*scales.shape[:-1], -1)
    return unpacked


def with_packed(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor | PackedTensor]:
    """The tensors of a checkpoint, with each pair of blocks and scales as the one weight that it is.

    Raises:
        CheckpointError: the two parts of a weight do not fit.
    """
    tensors: dict[str, StoredTensor | PackedTensor] = dict(stored)
    for name in stored:
        weight = name.removesuffix(BLOCKS)
        if weight == name or weight + SCALES not in stored:
            continue
        blocks, scales = tensors.pop(name), tensors.pop(weight + SCALES)
        if len(scales.shape) != 3 or blocks.shape != (*scales.shape, _BLOCK // 2):
            raise CheckpointError(
                f"{name} is {list(blocks.shape)} and {weight + SCALES} {list(scales.shape)}; MXFP4 has 16 bytes a "
                "scale, [experts, outputs, inputs / 32]; fetch the checkpoint again, as it was published"
            )
        tensors[weight] = PackedTensor(weight, stored[name], stored[weight + SCALES])
    return tensors
