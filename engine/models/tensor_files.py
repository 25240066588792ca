"""The safetensors files of a checkpoint folder: where each tensor is and its shape; tensors are read one at a time.

Every header is read and checked before the first tensor, so a shard that is missing or cut short is found at once.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from engine.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OTHER_WEIGHTS = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz")
BLOCKS, SCALES = "_blocks", "_scales"
"""Suffixes of the two tensors of bytes that a weight in MXFP4 is stored as."""
_DTYPES = ("F32", "F16", "BF16")
_BYTES = "U8"
_REMEDY = "fetch it again, as it was published"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        name: the tensor's name in the file.
        path: the file.
        shape: the shape by the file's header.
    """

    name: str
    path: Path
    shape: tuple[int, ...]

    def read(self, index: tuple[slice, ...] = ()) -> NDArray[Any]:
        """Reads the tensor, or a part of it: float32, float16, bfloat16 or the bytes of MXFP4, as stored.

        Args:
            index: a slice for each of the leading axes; only that part is read.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            with safe_open(self.path, framework="np") as file:
                if all(part == slice(None) for part in index):
                    return np.asarray(file.get_tensor(self.name))
                return np.asarray(file.get_slice(self.name)[index])
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        CheckpointError: there is no such file, it does not hold a JSON object, a key occurs twice, or a number is NaN
            or Infinity, which are not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; a Hugging Face checkpoint has it") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} nests tables or lists too deeply to be a checkpoint's; {_REMEDY}") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a JSON object; {_REMEDY}")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} occurs twice")
    return table


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of a checkpoint, from one ``model.safetensors`` or from the shards of its index.

    Raises:
        CheckpointError: a file is missing or corrupt, the index and its shards disagree, or a dtype is not supported.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return _read_header(single)
    if not index.is_file():
        others = [path.name for path in sorted(directory.iterdir()) if path.suffix in OTHER_WEIGHTS]
        found = f" but {', '.join(others[:2])}{', …' if len(others) > 2 else ''}" if others else ""
        raise CheckpointError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}; convert it to safetensors"
        )
    return _read_shards(directory, index)


def _read_shards(directory: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no table weight_map of tensor names to file names; {_REMEDY}")
    shards = sorted(set(weight_map.values()))
    if foreign := [shard for shard in shards if Path(shard).name != shard]:
        raise CheckpointError(f"{index} names {foreign}, outside its own folder; {_REMEDY}")
    if missing := [shard for shard in shards if not (directory / shard).is_file()]:
        raise CheckpointError(f"{directory} lacks {len(missing)} of {len(shards)} shards: {missing}; fetch them")
    found = {shard: _read_header(directory / shard) for shard in shards}
    if astray := sorted(name for name, shard in weight_map.items() if name not in found[shard]):
        raise CheckpointError(
            f"{index} points {len(astray)} tensors at shards that do not hold them, first {astray[0]!r} at "
            f"{weight_map[astray[0]]}; {_REMEDY}"
        )
    return {name: found[shard][name] for name, shard in weight_map.items()}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 — not a mapping
            dtypes = {name: stored.get_dtype() for name, stored in slices.items()}
            shapes = {name: tuple(stored.get_shape()) for name, stored in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    packed = {name for name, dtype in dtypes.items() if dtype == _BYTES and name.endswith((BLOCKS, SCALES))}
    if foreign := {name: dtype for name, dtype in dtypes.items() if dtype not in _DTYPES and name not in packed}:
        raise CheckpointError(f"{path} stores tensors in unsupported dtypes: {foreign}; supported: {list(_DTYPES)}")
    return {name: StoredTensor(name, path, shape) for name, shape in shapes.items()}


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot read {path}: {error}; it is truncated or corrupt: {_REMEDY}")
