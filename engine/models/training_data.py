"""Windows of the training text as token ids, and the part of the text that is held out."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError
from engine.models.default_model import BOS_TOKEN_ID

TRAINING_TEXT_DIR: Final = Path(__file__).parent / "training_text"
"""Folder of the public-domain texts; its README says where they come from."""

_HELD_OUT_SHARE = 0.05


def load_texts(directory: Path = TRAINING_TEXT_DIR) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """Reads every ``*.txt``; the last twentieth of each is held out.

    Returns:
        The bytes to train on and the held-out bytes, each one array per file, in the order of the file names.

    Raises:
        ConfigError: the folder has no text.
    """
    texts = [np.frombuffer(path.read_bytes(), np.uint8) for path in sorted(directory.glob("*.txt"))]
    if not texts:
        raise ConfigError(f"no training text: {directory} holds no *.txt; restore it from the source tree")
    cuts = [int(len(text) * (1 - _HELD_OUT_SHARE)) for text in texts]
    pairs = list(zip(texts, cuts, strict=True))
    return [text[:cut] for text, cut in pairs], [text[cut:] for text, cut in pairs]


def sample_windows(
    texts: list[NDArray[np.uint8]], count: int, length: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    """Draws windows uniformly over all texts, each behind the token that begins a text.

    Args:
        texts: the bytes of each text, at least ``length``.
        count: number of windows.
        length: bytes per window.
        rng: random generator.

    Returns:
        int32 ``[count, length + 1]``.
    """
    starts_per_text = np.array([len(text) - length + 1 for text in texts])
    choices = rng.choice(len(texts), size=count, p=starts_per_text / starts_per_text.sum())
    windows = np.empty((count, length + 1), np.int32)
    windows[:, 0] = BOS_TOKEN_ID
    for row, choice in enumerate(choices):
        start = rng.integers(starts_per_text[choice])
        windows[row, 1:] = texts[choice][start : start + length]
    return windows


def consecutive_windows(texts: list[NDArray[np.uint8]], length: int) -> NDArray[np.int32]:
    """Cuts texts into consecutive windows like those of `sample_windows`; a remainder is left out.

    Returns:
        int32 ``[windows, length + 1]``.
    """
    rows = [text[: len(text) // length * length].reshape(-1, length) for text in texts]
    windows = np.concatenate(rows).astype(np.int32)
    return np.concatenate([np.full((len(windows), 1), BOS_TOKEN_ID, np.int32), windows], axis=1)
