"""Trains the Llama that ships with the package, on the public-domain text that ships with it.

Byte-level next-token prediction with Muon (Jordan, 2024) under a cosine schedule with warm-up. Most steps train on
short windows, which are cheap; the last steps train on the whole context, so that the model knows every position.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from engine.errors import ConfigError
from engine.models.checkpoint import save_model, write_whole
from engine.models.decoder import Decoder
from engine.models.default_model import DEFAULT_MODEL_DIR, byte_tokenizer, default_config
from engine.models.dense import dense_logits
from engine.models.text import TOKENIZER_FILE
from engine.models.training_data import consecutive_windows, load_texts, sample_windows
from engine.terminal import plain_console

_DEFAULT_STEPS = 1200
_BYTES_PER_STEP = 2048
_SHORT_WINDOW = 256
_LONG_SHARE = 0.3
_PEAK_LEARNING_RATE = 0.04
_WEIGHT_DECAY = 0.1
_REPORT_EVERY = 25
_PROGRESS_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)

State = Any
"""A pytree of the model's parameters."""


@dataclass(frozen=True)
class TrainingResult:
    """The losses of a training run.

    Attributes:
        train_bits_per_byte: mean loss of the last reported steps.
        held_out_bits_per_byte: loss on held-out text.
    """

    train_bits_per_byte: float
    held_out_bits_per_byte: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the training command."""
    parser.add_argument("--out", type=Path, default=DEFAULT_MODEL_DIR, help="folder to write")
    parser.add_argument("--steps", type=int, default=_DEFAULT_STEPS, help="optimiser steps of 2048 bytes each")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order of the text (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Runs the training command: trains, saves, prints the losses.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: the extra ``train`` is not installed, a number is out of range, or the folder cannot be written.
    """
    _require_writable(args.out)
    model, result = train_default_model(args.steps, args.seed, plain_console(stderr=True))
    save_model(model, args.out, dtype=jnp.bfloat16)
    write_whole(args.out / TOKENIZER_FILE, byte_tokenizer().to_str())
    print(
        f"{args.out}: {result.train_bits_per_byte:.3f} bits per byte in training, "
        f"{result.held_out_bits_per_byte:.3f} on held-out text"
    )
    return 0


def _require_writable(folder: Path) -> None:
    """Raises ConfigError before the minutes that training takes, rather than after them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"cannot write to --out {folder}: {error.strerror}; name another folder") from error


def train_default_model(steps: int, seed: int, console: Console) -> tuple[Decoder, TrainingResult]:
    """Trains the default geometry from random weights.

    Args:
        steps: optimiser steps.
        seed: seed of the weights and of the order of the text.
        console: console of the progress bar.

    Raises:
        ConfigError: the extra ``train`` is not installed, or a number is out of range.
    """
    if steps <= 0:
        raise ConfigError(f"cannot train for {steps} steps; give a positive number")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"cannot draw weights with the seed {seed}; give a number from 0 to 2**32 - 1")
    optimizer = _optimizer(steps)
    training_text, held_out_text = load_texts()
    # The generator by name, since jax's default generator is a setting.
    rngs = nnx.Rngs(jax.random.key(seed, impl="threefry2x32"))
    model = Decoder(default_config(), dtype=jnp.float32, rngs=rngs)
    graph, state = nnx.split(model)
    step = jax.jit(partial(_step, graph, optimizer), donate_argnums=(0, 1))
    batches = _batches(training_text, steps, model.config.max_position_embeddings, np.random.default_rng(seed))
    state, loss = _run_steps(step, state, optimizer.init(state), batches, steps, console)
    nnx.update(model, state)
    held_out = consecutive_windows(held_out_text, _SHORT_WINDOW)
    return model, TrainingResult(loss / math.log(2), bits_per_byte(model, held_out))


def bits_per_byte(model: Decoder, windows: NDArray[np.int32]) -> float:
    """The model's mean loss over windows of text, in bits per byte.

    Args:
        model: a model over the byte-level vocabulary.
        windows: int32 ``[windows, length + 1]``, from `consecutive_windows`.
    """
    graph, state = nnx.split(model)
    return float(jax.jit(partial(_loss, graph))(state, windows)) / math.log(2)


def _optimizer(steps: int) -> Any:
    try:
        import optax
        from optax.contrib import muon
    except ImportError as error:
        raise ConfigError("training needs optax, which is not installed; install the extra 'train'") from error
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=_PEAK_LEARNING_RATE,
        warmup_steps=min(50, steps // 10),
        decay_steps=steps,
        end_value=_PEAK_LEARNING_RATE / 50,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon(schedule, weight_decay=_WEIGHT_DECAY))


def _batches(
    texts: list[NDArray[np.uint8]], steps: int, context: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int32]]:
    """Yields a batch per step, all of about the same bytes: short windows first, the whole context at the end."""
    first_long_step = math.ceil(steps * (1 - _LONG_SHARE))
    for index in range(steps):
        # The token that begins a window takes one position of the context.
        length = _SHORT_WINDOW if index < first_long_step else context - 1
        yield sample_windows(texts, _BYTES_PER_STEP // length, length, rng)


def _loss(graph: Any, state: State, windows: Array) -> Array:
    """Mean cross-entropy in nats of predicting every token but the first: int32 ``[B, T]`` -> float32 scalar."""
    model = nnx.merge(graph, state)
    log_probabilities = jax.nn.log_softmax(dense_logits(model, windows[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, windows[:, 1:, None], axis=-1))


def _step(graph: Any, optimizer: Any, state: State, moments: Any, windows: Array) -> tuple[State, Any, Array]:
    loss, gradients = jax.value_and_grad(partial(_loss, graph))(state, windows)
    updates, moments = optimizer.update(gradients, moments, state)
    return jax.tree.map(jnp.add, state, updates), moments, loss


def _run_steps(
    step: Callable[..., tuple[State, Any, Array]],
    state: State,
    moments: Any,
    batches: Iterator[NDArray[np.int32]],
    steps: int,
    console: Console,
) -> tuple[State, float]:
    """Runs all steps under a progress bar; returns the parameters and the mean loss in nats of the last steps."""
    mean_loss = math.nan
    with Progress(*_PROGRESS_COLUMNS, console=console) as progress:
        task = progress.add_task("training", total=steps)
        while group := list(itertools.islice(batches, _REPORT_EVERY)):
            losses = []
            for windows in group:
                state, moments, loss = step(state, moments, windows)
                losses.append(loss)
            mean_loss = float(np.mean(losses))
            progress.update(task, advance=len(group), description=f"{mean_loss / math.log(2):.3f} bits per byte")
    return state, mean_loss
