"""Plots the error of each dtype of the pool against the bytes that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from engine.kv import KVLayout
from engine.kv.stored import as_stored

if TYPE_CHECKING:
    from engine.bench.quality import Quality

HEAD_DIM, TOKENS, SPREAD = 128, 4096, 8.0
LEAST = 1e-5  # bits per byte; what is smaller, or better than float32 by chance, is drawn there


def draw(found: Sequence[Quality], model: str, directory: Path) -> None:
    """Writes ``quantised-kv.png``.

    Args:
        found: of each dtype, float32 first.
        model: name of the model, for the title.
        directory: where the file goes; made if it does not exist.
    """
    figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    exact = found[0].bits
    for each in found[1:]:
        left.plot(1 / each.tokens, max(each.bits - exact, LEAST), "o", label=each.dtype)
        right.plot(_bytes_of(each.dtype), _row_error(each.dtype), "o", label=each.dtype)
    left.set_title(f"held-out text, {model}", fontsize=10)
    left.set_xlabel("bytes per token, bfloat16 = 1")
    left.set_ylabel("bits per byte over float32")
    right.set_title(f"keys of {HEAD_DIM}, one channel {SPREAD:g} times the others", fontsize=10)
    right.set_xlabel("bytes per element, scales included")
    right.set_ylabel("relative error of q·k")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.grid(visible=True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"error against bytes; jax {jax.__version__}", fontsize=10)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "quantised-kv.png"
    figure.savefig(path)
    print(f"drew {path}")


def _bytes_of(dtype: str) -> float:
    layout = KVLayout.create(head_num=1, head_dim=HEAD_DIM, dtype=dtype, page_size=1)
    return layout.bytes_per_token / (2 * HEAD_DIM)


def _row_error(dtype: str) -> float:
    """Root mean square error of ``q·k`` over its root mean square, of normal q and k with one large channel of k."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, TOKENS, 1, HEAD_DIM)).astype(np.float32)
    k[..., 0] *= SPREAD
    stored, _ = as_stored(jnp.asarray(k), jnp.asarray(k), dtype=dtype)
    exact, got = ((q.astype(np.float64) * np.asarray(keys, np.float64)).sum(-1) for keys in (k, stored))
    return float(np.sqrt(np.square(got - exact).mean() / np.square(exact).mean()))
