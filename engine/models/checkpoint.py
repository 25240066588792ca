"""Hugging Face checkpoints: ``config.json`` and safetensors, read and written.

The model is built abstractly and filled tensor by tensor, so at most one tensor exists twice at any time. Over a mesh
each device gets its part straight from the file, and a process reads only what its own devices hold.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from numpy.typing import NDArray
from safetensors.numpy import save_file

from engine.distributed.mesh import TENSOR_AXIS, axis_size
from engine.errors import CheckpointError
from engine.kv.room import room_for
from engine.models.checked_values import require_token_ids
from engine.models.decoder import Decoder
from engine.models.model_config import ModelConfig
from engine.models.mxfp4 import PackedTensor, with_packed
from engine.models.sharding import abstract_model, key_names, repeat_heads, repeats_of, split_config, weight_bytes
from engine.models.tensor_files import INDEX_FILE, SINGLE_FILE, StoredTensor, read_json, stored_tensors
from engine.models.tensor_names import of_the_language_model, tensor_name

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
# Old checkpoints store frequencies that follow from the config; a tied model may store its embedding a second time.
_REDUNDANT = re.compile(r"rotary_emb\.inv_freq$")
_TIED_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_ROWS_COMPARED = 4096  # rows compared at once: both tensors may be gigabytes

_logger = logging.getLogger(__name__)

Tensor = StoredTensor | PackedTensor
"""What a checkpoint stores as one weight."""


def load_config(directory: str | Path) -> ModelConfig:
    """Reads the geometry of a checkpoint.

    Args:
        directory: folder with ``config.json``. Where there is a ``generation_config.json``, the end-of-text tokens of
            both files count.

    Raises:
        CheckpointError: there is no such folder, or a file is missing or is not JSON.
        ConfigError: the model is not supported.
    """
    directory = Path(directory)
    _require_checkpoint(directory)
    config = ModelConfig.from_hf(read_json(directory / CONFIG_FILE))
    generation = directory / GENERATION_CONFIG_FILE
    if not generation.is_file():
        return config
    name = f"eos_token_id of {GENERATION_CONFIG_FILE}"
    more = require_token_ids(name, read_json(generation).get("eos_token_id"))
    return dataclasses.replace(config, eos_token_id=tuple(dict.fromkeys([*config.eos_token_id, *more])))


def _require_checkpoint(directory: Path) -> None:
    """Raises CheckpointError where ``directory`` is not a folder with a ``config.json``, and says what it is."""
    need = f"a checkpoint is a folder with {CONFIG_FILE} and safetensors, in the Hugging Face layout"
    try:
        if directory.suffix == ".gguf":
            raise CheckpointError(f"{directory} is a GGUF file, which is not supported; {need}")
        if directory.is_file():
            raise CheckpointError(f"{directory} is a file; {need}: give the folder")
        if not directory.is_dir():
            hub = "; a name on a hub is not fetched: download it and give the folder" * (len(directory.parts) == 2)
            raise CheckpointError(f"there is no folder {directory}: {need}{hub}")
        if not (directory / CONFIG_FILE).exists():
            names = sorted(path.name for path in directory.iterdir())
            raise CheckpointError(f"{directory / CONFIG_FILE} does not exist; {need}; the folder holds {_first(names)}")
    except OSError as error:
        raise CheckpointError(f"cannot look into {directory}: {error.strerror}; {need}") from error


def load_model(directory: str | Path, *, dtype: Any, mesh: Mesh | None = None) -> Decoder:
    """Reads a checkpoint: one ``model.safetensors``, or shards with an index.

    All names and shapes are checked before the first tensor is read.

    Args:
        directory: the checkpoint's folder.
        dtype: dtype of weights and activations, whatever the dtype of the stored weights.
        mesh: mesh over whose axis "tensor" the weights are split; KV heads fewer than its devices are repeated.

    Returns:
        The model, over the mesh or on the default device; its config counts KV heads as repeated.

    Raises:
        CheckpointError: a file or tensor is missing, corrupt, unexpected or of the wrong shape.
        ConfigError: the model is not supported, the mesh does not divide it, or the devices' memory is too small.
    """
    directory = Path(directory)
    stored_config = load_config(directory)
    config = split_config(stored_config, axis_size(mesh, TENSOR_AXIS))
    stored = with_packed(of_the_language_model(stored_tensors(directory)))
    expected = {
        _tensor_name(path): _stored_shape(path, leaf.shape)
        for path, leaf in _leaves_of(abstract_model(stored_config, dtype))[0]
    }
    _check_tensors(directory, stored_config, expected, stored)
    if stored_config.tie_word_embeddings and _TIED_HEAD in stored:
        _tell_of_another_head(directory, stored[_TIED_HEAD], stored[_EMBEDDING])
    model = abstract_model(config, dtype, mesh)
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    with room_for(f"the model of {directory} in {np.dtype(dtype).name}", weight_bytes(model), devices):
        return _filled(model, config, stored_config, stored)


def _filled(model: Decoder, config: ModelConfig, stored_config: ModelConfig, stored: Mapping[str, Tensor]) -> Decoder:
    """Fills the abstract model with its weights, tensor by tensor."""
    state = nnx.state(model)
    leaves, treedef = _leaves_of(model)
    arrays = []
    for path, leaf in leaves:
        heads = stored_config.num_key_value_heads, config.num_key_value_heads
        repeats = repeats_of(key_names(path), *heads)
        arrays.append(_StoredParameter(stored[_tensor_name(path)], path, repeats, config.head_dim).load(leaf))
    nnx.replace_by_pure_dict(state, jax.tree_util.tree_unflatten(treedef, arrays))
    nnx.update(model, state)
    return model


def _tell_of_another_head(directory: Path, head: Tensor, embedding: Tensor) -> None:
    """Warns where a tied model's file holds an output projection other than its embedding, which is not used."""
    last = embedding.shape[0]
    rows = [(slice(at, min(at + _ROWS_COMPARED, last)),) for at in range(0, last, _ROWS_COMPARED)]
    if head.shape != embedding.shape or not all(np.array_equal(head.read(at), embedding.read(at)) for at in rows):
        _logger.warning(
            "%s ties its output projection to the embedding by %s, so the different %s that it stores is not used; "
            "set tie_word_embeddings to false if the model was trained with it",
            directory,
            CONFIG_FILE,
            head.name,
        )


def save_model(model: Decoder, directory: str | Path, *, dtype: Any = None) -> None:
    """Writes ``config.json`` and ``model.safetensors``; each file appears whole or not at all.

    Args:
        model: the model to write.
        directory: the folder, created where it does not exist.
        dtype: dtype to store the weights in; None is the model's own.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    target = np.dtype(model.dtype if dtype is None else dtype)
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    tensors = {}
    for path, leaf in leaves:
        array = np.asarray(leaf)
        # The writer stores the buffer as it lies in memory, so a transposed view would be stored untransposed.
        tensors[_tensor_name(path)] = np.ascontiguousarray(array.T if _is_kernel(path) else array, dtype=target)
    partial = directory / f"{SINGLE_FILE}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # the writer makes its files private
    os.replace(partial, directory / SINGLE_FILE)
    config = model.config.to_hf() | {"dtype": target.name}
    write_whole(directory / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _leaves_of(model: Decoder) -> tuple[list[tuple[Any, Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))


def _is_kernel(path: Sequence[Any]) -> bool:
    return key_names(path)[-1] == "kernel"


def _tensor_name(path: Sequence[Any]) -> str:
    return tensor_name(key_names(path))


def _stored_shape(path: Sequence[Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    # nnx keeps kernels as [in, out], checkpoints as [out, in].
    return shape[::-1] if _is_kernel(path) else shape


@dataclass(frozen=True)
class _StoredParameter:
    """A parameter as the checkpoint stores it: each KV head once, and kernels transposed."""

    tensor: Tensor
    path: Sequence[Any]
    repeats: int
    head_dim: int

    def load(self, target: jax.ShapeDtypeStruct) -> jax.Array:
        """The parameter in the shape, dtype and sharding of ``target``."""
        if target.sharding is None:
            return jnp.asarray(self._part((), target.shape), dtype=target.dtype)

        def part(index: tuple[slice, ...] | None) -> NDArray[Any]:
            return np.asarray(self._part(index or (), target.shape), dtype=target.dtype)

        return jax.make_array_from_callback(target.shape, target.sharding, part)

    def _part(self, index: tuple[slice, ...], shape: tuple[int, ...]) -> NDArray[Any]:
        """The part at ``index`` of the parameter of ``shape``; a repeated head is read once."""
        if self.repeats > 1:
            width = self.repeats * self.head_dim
            *leading, last = index or (slice(None),) * len(shape)
            start, stop, _ = last.indices(shape[-1])
            first, end = start // width, -(-stop // width)
            stored = self._read((*leading, slice(first * self.head_dim, end * self.head_dim)))
            repeated: NDArray[Any] = repeat_heads(stored, self.repeats, self.head_dim)
            return repeated[..., start - first * width : stop - first * width]
        return self._read(index)

    def _read(self, index: tuple[slice, ...]) -> NDArray[Any]:
        if not _is_kernel(self.path):
            return self.tensor.read(index)
        return self.tensor.read(index[::-1]).T


def _check_tensors(
    directory: Path, config: ModelConfig, expected: dict[str, tuple[int, ...]], stored: Mapping[str, Tensor]
) -> None:
    ignored = {_TIED_HEAD} if config.tie_word_embeddings else set()
    unexpected = sorted(name for name in stored.keys() - expected.keys() - ignored if _REDUNDANT.search(name) is None)
    missing = sorted(expected.keys() - stored.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{directory} does not hold the model that {CONFIG_FILE} describes: {len(missing)} tensors missing "
            f"{_first(missing)}, {len(unexpected)} unexpected {_first(unexpected)}; {CONFIG_FILE} and the weights "
            f"(or {INDEX_FILE}) must belong together"
        )
    wrong = sorted(name for name, shape in expected.items() if stored[name].shape != shape)
    if wrong:
        raise CheckpointError(
            f"{directory} has {len(wrong)} tensors of the wrong shape, first {wrong[0]!r}: expected "
            f"{list(expected[wrong[0]])} by {CONFIG_FILE}, found {list(stored[wrong[0]].shape)}; the two must match"
        )


def _first(names: list[str], limit: int = 4) -> str:
    return f"[{', '.join(names[:limit])}{', …' if len(names) > limit else ''}]"
