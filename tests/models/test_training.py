from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from engine.errors import ConfigError
from engine.models import train
from engine.models.checkpoint import load_model
from engine.models.default_model import BOS_TOKEN_ID, default_config
from engine.models.text import load_tokenizer
from engine.models.training_data import TRAINING_TEXT_DIR, consecutive_windows, load_texts, sample_windows


def quiet() -> Console:
    return Console(file=io.StringIO())


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(given)


def test_training_and_held_out_text_are_disjoint_and_complete() -> None:
    training, held_out = load_texts()
    files = [path.read_bytes() for path in sorted(TRAINING_TEXT_DIR.glob("*.txt"))]
    assert [bytes(kept) + bytes(cut) for kept, cut in zip(training, held_out, strict=True)] == files
    assert all(0.04 < len(cut) / len(file) < 0.06 for cut, file in zip(held_out, files, strict=True))


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \*\.txt"):
        load_texts(tmp_path)


def test_sampled_windows_are_pieces_of_the_texts_behind_the_first_token() -> None:
    texts = [np.frombuffer(name * 50, np.uint8) for name in (b"abcdefghi", b"UVWXYZ")]
    windows = sample_windows(texts, 40, 17, np.random.default_rng(3))
    assert windows.shape == (40, 18)
    assert set(windows[:, 0]) == {BOS_TOKEN_ID}
    pieces = [bytes(row[1:].astype(np.uint8)) for row in windows]
    assert all(any(piece in bytes(text) for text in texts) for piece in pieces)
    assert len(set(pieces)) > 5


def test_consecutive_windows_are_the_text_in_order_without_its_remainder() -> None:
    texts = [np.arange(10, dtype=np.uint8), np.arange(100, 107, dtype=np.uint8)]
    windows = consecutive_windows(texts, 3)
    assert windows[:, 1:].ravel().tolist() == [*range(9), *range(100, 106)]
    assert set(windows[:, 0]) == {BOS_TOKEN_ID}


def test_training_without_optax_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ConfigError, match="extra 'train'"):
        train.train_default_model(1, 0, quiet())


@pytest.mark.parametrize("steps", [0, -3])
def test_training_for_no_steps_is_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=f"{steps} steps"):
        train.train_default_model(steps, 0, quiet())


def test_the_command_writes_a_checkpoint_that_loads(tmp_path: Path) -> None:
    pytest.importorskip("optax", reason="optax is not installed (the extra 'train')")
    assert train.run(arguments("--steps", "2", "--out", str(tmp_path / "new"))) == 0
    model = load_model(tmp_path / "new", dtype="float32")
    assert model.config == default_config()
    assert load_tokenizer(tmp_path / "new") is not None
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.slow
def test_training_learns_and_depends_on_the_seed_alone() -> None:
    pytest.importorskip("optax", reason="optax is not installed (the extra 'train')")
    runs = [train.train_default_model(40, seed, quiet()) for seed in (0, 0, 1)]
    parameters = [jax.tree.leaves(nnx.state(model)) for model, _ in runs]
    same, other = (
        all(np.array_equal(left, right) for left, right in zip(parameters[0], parameters[run], strict=True))
        for run in (1, 2)
    )
    assert same
    assert not other
    # Random weights need 8 bits a byte, the frequencies of single letters 4.4.
    assert runs[0][1].held_out_bits_per_byte < 4.0
